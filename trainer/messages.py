"""What commands print of the errors of others."""


def first_line(error: object) -> str:
    """The first line of an error's text that says anything; its class's name where none does."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
