"""Concept files of other tools, read and written on the side of the caller."""
