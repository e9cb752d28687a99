"""Attacks by where they come from; each is one function, with the groups of docs/attacks.md."""
