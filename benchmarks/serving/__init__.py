"""What the server costs and promises under load, measured: `python -m benchmarks.serving`."""
