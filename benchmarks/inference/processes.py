"""The benchmark's side of a worker: its process, what it is asked, how long it took."""

import json
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORKERS = Path(__file__).resolve().parent / "workers"


class WorkerFailed(Exception):
    """A system did not start or did not answer; its last words are the message."""


@dataclass(kw_only=True)
class Worker:
    """A system that waits for its next turn."""

    name: str
    process: "subprocess.Popen[str]"
    answers: Path
    log: Path

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """One turn: `call`, `draw` or `peak`."""
        assert self.process.stdin
        try:
            print(json.dumps({"do": do, **details}), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise WorkerFailed(last_words(self.log)) from error
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise WorkerFailed(last_words(self.log))
        return json.loads(line)

    def result(self, do: str) -> np.ndarray[Any, Any]:
        """What a turn with `keep` left."""
        return np.load(self.answers / f"{self.name}-{do}.npy")


@contextmanager
def running_worker(
    name: str, python: Path, script: str, folder: Path, settings: dict[str, Any]
) -> Generator[Worker]:
    """A worker that is ready, until the block ends. Raises `WorkerFailed`."""
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    file.write_text(json.dumps({**settings, "name": name, "answers": str(folder)}))
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, WORKERS / script, file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        worker = Worker(name=name, process=process, answers=folder, log=log)
        worker.hear()
        yield worker
    finally:
        process.terminate()
        process.communicate()


def last_words(log: Path) -> str:
    """The last line that a process has written."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
