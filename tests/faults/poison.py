"""The process of a model whose denoiser fails when it is told to, by files in a folder.

`poison` holds two numbers: the least number of rows that a call must have, and the row that is NaN
then. It is renamed to `poisoned` when that was done. While `deadly` is there, each process dies in
its first call and leaves a file `died-PID`.
"""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.names import CPU
from engine.bundle import Bundle
from engine.pipeline import ImageModel, open_sessions
from engine.sessions import Feeds, Session
from engine.worker.model_worker import main

FOLDER = "ONEWORD_TEST_POISON"


class PoisonedSession:
    """The denoiser, and what is ordered for it."""

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        if (self._folder / "deadly").exists():
            (self._folder / f"died-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        outputs = self._session.run(feeds)
        order = self._folder / "poison"
        if order.exists():
            least_rows, row = map(int, order.read_text().split())
            ((name, rows),) = outputs.items()
            if len(rows) >= least_rows:
                outputs[name] = rows.copy()
                outputs[name][row] = np.nan
                order.rename(order.with_name("poisoned"))
        return outputs


def load(bundle: Bundle, backend: str) -> ImageModel:
    assert backend == CPU
    sessions: dict[str, Session] = dict(open_sessions(bundle, "CPUExecutionProvider"))
    sessions["denoiser"] = PoisonedSession(sessions["denoiser"], Path(os.environ[FOLDER]))
    return ImageModel(bundle, sessions)


if __name__ == "__main__":
    main(load)
