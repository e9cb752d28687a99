"""The process of a model, with faults that a test orders: files in the folder `FAULTS` names.

A file COMPONENT.FAULT makes the next call of that graph fail, and is gone then: `kill` (SIGKILL in
mid-call), `raise` (where the file says `next`, the call after that), `hold` (until the process is
killed), `nan` (in the row that the file names).
`load.exit` makes every start fail, `load.hold` the next one hang; what `load.say` holds is printed
at the start.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.opening import open_model
from engine.bundle import Bundle
from engine.pipeline import ImageModel, open_sessions
from engine.sessions import Feeds, Session
from engine.worker.model_worker import main

FAULTS = "ONEWORD_TEST_FAULTS"
MODULE = "tests.faulty_worker"
EXIT_CODE = 3


class FaultySession:
    """A session, and before it the faults that are ordered for it."""

    def __init__(self, session: Session, name: str, faults: Path) -> None:
        self._session = session
        self._name = name
        self._faults = faults

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        if self._ordered("kill") is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._ordered("hold") is not None:
            (self._faults / f"{self._name}.held").touch()
            threading.Event().wait()
        if (when := self._ordered("raise")) is not None:
            if when != "next":
                raise RuntimeError("device lost")
            (self._faults / f"{self._name}.raise").touch()
        row = self._ordered("nan")
        outputs = self._session.run(feeds)
        if row is not None:
            (name,) = outputs
            outputs[name] = outputs[name].copy()
            outputs[name][int(row)] = np.nan
        return outputs

    def _ordered(self, fault: str) -> str | None:
        """What an order says; it is carried out once."""
        path = self._faults / f"{self._name}.{fault}"
        if not path.exists():
            return None
        text = path.read_text()
        path.unlink()
        return text


def load(bundle: Bundle, backend: str) -> ImageModel:
    if FAULTS not in os.environ:
        return open_model(bundle, backend)
    faults = Path(os.environ[FAULTS])
    if (say := faults / "load.say").exists():
        print(say.read_text(), flush=True)
    if (faults / "load.exit").exists():
        sys.exit(EXIT_CODE)
    if (hold := faults / "load.hold").exists():
        hold.unlink()
        threading.Event().wait()
    sessions: dict[str, Session] = {
        name: FaultySession(session, name, faults)
        for name, session in open_sessions(bundle, "CPUExecutionProvider").items()
    }
    return ImageModel(bundle, sessions)


if __name__ == "__main__":
    main(load)
