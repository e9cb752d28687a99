"""The runs of a long measurement, kept as soon as each is over: one that was stopped goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT
from benchmarks.run import machine
from benchmarks.serving.results import commit
from benchmarks.serving.settings import Settings

FOLDER = ROOT / "build" / "serving"


class KeptRuns:
    """Values by name, in a file for this part, code, machine and settings: a line of JSON each."""

    def __init__(self, part: str, settings: Settings, *, folder: Path = FOLDER) -> None:
        here = {key: value for key, value in machine().items() if key != "date"}
        words = repr((commit(), here, dataclasses.asdict(settings)))
        digest = hashlib.sha256(words.encode()).hexdigest()[:16]
        self._path = folder / f"{part}-{digest}.jsonl"
        self._kept = dict(_read(self._path))

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was kept under the name, or what is measured now; anything that JSON can hold."""
        if name not in self._kept:
            line = json.dumps([name, measure()])
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(line + "\n")
            self._kept[name] = json.loads(line)[1]
        return self._kept[name]

    def discard(self) -> None:
        """The next measurement begins anew."""
        self._path.unlink(missing_ok=True)


def _read(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # stopped while it was written
        path.write_text("".join(lines[:-1]))
        lines.pop()
    return [tuple(json.loads(line)) for line in lines]
