"""Faults of the machine under a running server: disks, databases, clocks, kills and floods."""
