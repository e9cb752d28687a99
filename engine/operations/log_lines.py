"""Logs that nobody can forge, and that keep to themselves what callers wrote."""

import copy
import logging
import traceback
from types import TracebackType
from typing import Any

from engine.printing import escaped

_CONTINUED = "  | "


class LineFormatter(logging.Formatter):
    """A record is one line, whatever is in it; what follows of an exception is marked."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_text = None  # what another formatter made of the exception, and keeps there
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _marked(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _marked(super().formatStack(stack_info))


def _marked(text: str) -> str:
    return "\n".join(_CONTINUED + escaped(line) for line in text.splitlines())


def describe_fault(error: BaseException) -> str:
    """What went wrong and where, without the words of the exceptions.

    Those may hold what a caller wrote: a prompt, say. They are for the level DEBUG.
    """
    kinds: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(kinds) < 8:
        kinds.append(f"{type(cause).__name__} at {_place(cause.__traceback__)}")
        cause = cause.__cause__ or cause.__context__
    return ", from ".join(kinds)


def _place(trace: TracebackType | None, most: int = 4) -> str:
    """The innermost calls, the last one first."""
    frames = traceback.extract_tb(trace)[-most:]
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    return " < ".join(places) or "an unknown place"
