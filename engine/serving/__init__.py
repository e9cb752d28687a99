"""The server: calls in, the work of the other packages, answers out."""
