"""Measurements beside diffusers, in the same run, on the same work. `make bench` runs them all."""
