"""A command and its terminal: SIGTERM as an exception."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM came: like Ctrl-C, but the exit code is another one."""


@contextmanager
def sigterm_raises() -> Generator[None]:
    """Raise `Terminated` on the first SIGTERM inside, and ignore further ones: work is being saved.

    Does nothing outside the main thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        # None stands for a handler that was not set from Python and cannot be set from it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
