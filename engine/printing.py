"""What strangers wrote, made safe to print."""

import sys


def printable(text: object) -> str:
    """Text of a file, a path or a server, with escapes for what commands a terminal or ends a line.

    Escaped too is what the terminal's encoding lacks, and bytes of a file name that are no UTF-8.
    """
    encoding = sys.stdout.encoding or "utf-8"
    return escaped(str(text)).encode(encoding, "backslashreplace").decode(encoding)


def escaped(text: str) -> str:
    """Text with escapes for line ends, terminal commands and marks that turn the writing round."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
