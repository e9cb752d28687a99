"""A log whose reader sleeps: nobody waits for it, and what was lost is told."""

import contextvars
import io
import json
import logging
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager

from engine.operations.calls import Call, set_current_call
from engine.operations.log_queue import PatientHandler
from engine.operations.logs import CallFilter, JsonFormatter


class Slow(logging.Handler):
    """Writes once it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.gate.wait()
        self.lines.append(record.getMessage())


@contextmanager
def _log_to(handler: PatientHandler) -> Generator[logging.Logger]:
    logger = logging.getLogger("tests.log_queue")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)


def test_nobody_waits_and_what_was_lost_is_told() -> None:
    slow = Slow()
    patient = PatientHandler(slow, max_lines=5)
    with _log_to(patient) as logger:
        for number in range(100):
            logger.warning("line %d", number)
        slow.gate.set()
        while patient._lines.qsize():
            pass
        logger.warning("the last")
    patient.flush_and_stop(10.0)
    told = [line for line in slow.lines if "were lost" in line]
    lost = int(told[0].split()[0])
    kept = [line for line in slow.lines if line.startswith("line")]
    assert len(told) == 1 and len(kept) + lost == 100
    assert kept == [f"line {number}" for number in range(len(kept))] and len(kept) in (5, 6)
    assert slow.lines[-1] == "the last"


def test_lines_are_as_they_were_when_they_were_written() -> None:
    slow, value = Slow(), ["before"]
    patient = PatientHandler(slow)
    with _log_to(patient) as logger:
        logger.warning("%s", value)
        value[0] = "after"
    slow.gate.set()
    patient.flush_and_stop(10.0)
    assert slow.lines == ["['before']"]


def test_a_full_pipe_does_not_hold_up_the_end() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        patient = PatientHandler(logging.StreamHandler(stream))
        with _log_to(patient) as logger:
            for _ in range(200):
                logger.warning("x" * 1000)  # some 200 kB into a pipe of 64
        patient.flush_and_stop(0.1)
        assert patient._thread.is_alive()
        missing = 200 * len("x" * 1000 + "\n")  # exactly: one read more would wait for ever
        while missing:
            missing -= len(os.read(reading, missing))
        patient._thread.join(10.0)
        assert not patient._thread.is_alive()
    os.close(reading)


def test_a_line_tells_the_call_that_it_was_written_in() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(CallFilter())
    handler.setFormatter(JsonFormatter())
    patient = PatientHandler(handler)

    def in_a_call() -> None:
        set_current_call(Call(request_id="one", method="/a.Service/Method", peer=""))
        logger.warning("within")

    with _log_to(patient) as logger:
        contextvars.copy_context().run(in_a_call)
        logger.warning("outside")
    patient.flush_and_stop(10.0)
    within, outside = map(json.loads, stream.getvalue().splitlines())
    assert (within["request_id"], within["method"]) == ("one", "/a.Service/Method")
    assert "request_id" not in outside
