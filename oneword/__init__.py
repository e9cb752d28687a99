"""The command line: it composes engine and trainer, so that neither imports the other."""
