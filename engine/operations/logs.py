"""The log of a server: one line a record, as text or JSON, with the call that it belongs to.

What callers write (prompts, tokens, names of files) is kept out where it would be logged; here
nothing that is logged can end a line or command a terminal.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from engine.operations.calls import current_call
from engine.operations.log_lines import LineFormatter
from engine.printing import escaped
from engine.security.callers import current_caller

LogFormat = Literal["text", "json"]


class CallFilter(logging.Filter):
    """Notes in each record which call it belongs to, while the task of the call runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = current_call()
        record.call = call
        record.tenant = current_caller().tenant if call else None
        return True


class HeaderFilter(logging.Filter):
    """Leaves out what gRPC says of a header that is no UTF-8: the header, and a traceback.

    It may be a token with a slip in it, and anybody can send as many as he likes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (
            record.name.startswith("grpc.") and str(record.msg).startswith("Invalid encoding")
        )


class CallFormatter(LineFormatter):
    """A line of text; in brackets, to whom it belongs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        call = getattr(record, "call", None)
        line = super().formatMessage(record)
        if call is None or hasattr(record, "fields"):  # an access line has them anyway
            return line
        tenant = escaped(str(getattr(record, "tenant", "")))
        return (
            f"{line} [request_id={call.request_id} tenant={tenant} method={escaped(call.method)}]"
        )


class JsonFormatter(logging.Formatter):
    """One JSON object a record. Keys: time, level, logger, message, those of the call, and those
    that the record brings along."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if call := getattr(record, "call", None):
            entry |= {
                "request_id": call.request_id,
                "tenant": getattr(record, "tenant", None),
                "method": call.method,
            }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        # ASCII: what is not is escaped, so no terminal takes it for a command.
        return json.dumps(entry, default=str, ensure_ascii=True)


def configure_logging(log_format: LogFormat, stream: Any = None) -> logging.Handler:
    """Send the log of this process to stderr in one of the two formats; returns the handler."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(CallFilter())
    handler.addFilter(HeaderFilter())
    handler.setFormatter(
        JsonFormatter()
        if log_format == "json"
        else CallFormatter("%(asctime)s %(levelname)s %(message)s")
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old, logging.StreamHandler) and old.stream in (sys.stderr, stream):
            root.removeHandler(old)
    root.addHandler(handler)
    return handler
