"""Log lines that nobody can forge."""

import copy
import logging
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
