"""What the server costs and promises under load, measured."""
