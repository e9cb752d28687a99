"""What strangers wrote, made safe to print."""


def printable(text: str) -> str:
    """Text of a file or a server, with escapes for what would command a terminal or end a line."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
