"""One image on a CPU, beside every system that a user might pick instead."""
