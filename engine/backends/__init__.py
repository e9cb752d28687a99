"""Backends: where graphs run, and images that stay in the memory of a device between steps."""
