"""Learning on the server: uploads, a queue, and processes that learn."""
