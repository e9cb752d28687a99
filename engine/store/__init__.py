"""The stored concepts: an index in SQLite or PostgreSQL, files in a folder or elsewhere."""
