"""What a model's process writes: passed on to the server's log, bounded in every way."""

import logging
import threading
import time
from collections import deque
from typing import IO

logger = logging.getLogger(__name__)

_MAX_LINE_BYTES = 500
_KEPT_LINES = 20  # the end, for the report of a crash
_LINES_PER_PERIOD = 100
_PERIOD_S = 10.0


class WorkerLog:
    """Reads a stream in a thread of its own until it ends."""

    def __init__(self, stream: IO[bytes], prefix: str) -> None:
        self._stream = stream
        self._prefix = prefix
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._thread = threading.Thread(target=self._read, name="worker log", daemon=True)
        self._thread.start()

    def tail(self, *, wait_s: float = 0.0) -> list[str]:
        """The last lines; waits for the end of the stream, at most `wait_s`."""
        self._thread.join(wait_s)
        return list(self._last)

    def _read(self) -> None:
        allowance, period_began = _LINES_PER_PERIOD, time.monotonic()
        with self._stream:
            while line := self._stream.readline(_MAX_LINE_BYTES):
                text = printable(line)
                self._last.append(text)
                if time.monotonic() - period_began > _PERIOD_S:
                    self._tell_left_out(allowance)
                    allowance, period_began = _LINES_PER_PERIOD, time.monotonic()
                allowance -= 1
                if allowance >= 0:
                    logger.info("%s: %s", self._prefix, text)
        self._tell_left_out(allowance)

    def _tell_left_out(self, allowance: int) -> None:
        if allowance < 0:
            logger.info("%s: %d more lines, left out here", self._prefix, -allowance)


def printable(line: bytes) -> str:
    """One line of a log, whatever the bytes: no second line, no commands for a terminal."""
    text = line.decode(errors="replace").rstrip()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
