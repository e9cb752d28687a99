"""The model in a process of its own, and its supervision from the side of the server."""
