"""Captions that a user wrote for an image: a text file beside it, one sentence a line."""

import re
from pathlib import Path

MAX_FILE_BYTES = 64 << 10
MAX_CAPTIONS = 200
# What prompts give a meaning (engine.prompt_syntax): in a caption they are only characters.
_SYNTAX = re.compile(r"([\\()\[\]<>])")


class BadCaption(Exception):
    """Why a caption file cannot be used."""


def read_captions(path: Path, placeholder_token: str) -> tuple[str, ...]:
    """The captions of a file as templates: `{}` stands where the word goes.

    A line may hold `{}` or the placeholder token itself, once; empty lines and lines that begin
    with `#` are left out.

    Errors:
        BadCaption: the file is unreadable, empty or too long, or a line does not say where the
            word goes.
    """
    lines = [line.strip() for line in _text(path).splitlines()]
    captions = tuple(
        _template(line, number, placeholder_token)
        for number, line in enumerate(lines, start=1)
        if line and not line.startswith("#")
    )
    if not captions:
        raise BadCaption("it has no caption; write one, or delete the file")
    if len(captions) > MAX_CAPTIONS:
        raise BadCaption(f"it has {len(captions)} captions, up to {MAX_CAPTIONS} are used")
    return captions


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadCaption(f"it cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise BadCaption(f"it is larger than {MAX_FILE_BYTES >> 10} KB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadCaption(f"it is not UTF-8 text (byte {error.start})") from error


def _template(line: str, number: int, placeholder_token: str) -> str:
    """The line with `{}` for the word, all that prompts would interpret taken literally."""
    parts = line.replace(placeholder_token, "{}").split("{}")
    if len(parts) != 2:
        raise BadCaption(
            f"line {number} has the word {len(parts) - 1} times, it must have it once: write {{}} "
            f"or {placeholder_token} where it goes, as in 'a photo of {{}} on a table'"
        )
    before, after = (_SYNTAX.sub(r"\\\1", part) for part in parts)
    # Templates are filled in with str.format.
    return "{}".join(part.replace("{", "{{").replace("}", "}}") for part in (before, after))
