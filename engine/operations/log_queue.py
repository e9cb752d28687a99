"""A log that never holds up who writes it.

A pipe that nobody reads is full after 64 KiB, and the next line waits for its reader: the whole
server would, since its event loop logs. Here lines wait in a bounded queue for a thread of their
own; beyond it they are dropped and counted.
"""

import atexit
import logging
import queue
import threading
from logging.handlers import QueueHandler

MAX_LINES = 10_000
FLUSH_S = 2.0  # for what is left when the process ends


class PatientHandler(QueueHandler):
    """Passes records on to another handler, in another thread."""

    def __init__(self, handler: logging.Handler, *, max_lines: int = MAX_LINES) -> None:
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(max_lines)
        super().__init__(self._lines)
        self._handler = handler
        # What is known of a record only in the task that writes it is noted there, and there alone:
        # a filter that ran again on the other side would find no call.
        for one in list(handler.filters):
            self.addFilter(one)
            handler.removeFilter(one)
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record itself, with its text settled: what it is made of may change meanwhile."""
        record.msg, record.args = record.getMessage(), None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._lost:
                self._lines.put_nowait(self._about_lost())
                self._lost = 0
            self._lines.put_nowait(record)
        except queue.Full:
            self._lost += 1

    def flush_and_stop(self, timeout_s: float = FLUSH_S) -> None:
        """Write what waits, if it can be written within the time."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _about_lost(self) -> logging.LogRecord:
        return logging.LogRecord(
            __name__,
            logging.WARNING,
            __file__,
            0,
            "%d lines of this log were lost: nobody read it for a while",
            (self._lost,),
            None,
        )

    def _run(self) -> None:
        while (record := self._lines.get()) is not None:
            self._handler.handle(record)


def never_wait_for(handler: logging.Handler) -> PatientHandler:
    """Put a handler of the root logger behind a queue, until the process ends."""
    root, patient = logging.getLogger(), PatientHandler(handler)
    root.removeHandler(handler)
    root.addHandler(patient)
    atexit.register(patient.flush_and_stop)
    return patient
