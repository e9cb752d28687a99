"""What strangers wrote, made safe to print."""

import sys


def printable(text: object) -> str:
    """Text of a file, a path or a server, with escapes for what commands a terminal or ends a line.

    Escaped too is what the terminal's encoding lacks, and bytes of a file name that are no UTF-8.
    """
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )
    encoding = sys.stdout.encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)
