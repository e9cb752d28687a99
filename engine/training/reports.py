"""What a learning process tells the server: one report a line, as JSON.

The server starts the process and reads the lines from its standard output; nothing of Python's own
serialization crosses between them.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

MAX_REASON_CHARACTERS = 500
MAX_LINE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A state of the run."""

    step: int
    steps: int
    loss: float | None  # None before the first step
    initial_evaluation_loss: float
    best_evaluation_loss: float
    best_step: int
    preview_step: int = 0  # of the preview in the folder; 0: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """An image that is not learned from."""

    index: int  # in the order of the upload
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why the process ends without a result."""

    reason: str
    retryable: bool  # whether another attempt could end otherwise


Report = Progress | Skipped | Failure
_KINDS: dict[str, type[Report]] = {
    "progress": Progress,
    "skipped": Skipped,
    "failure": Failure,
}


def to_line(report: Report) -> bytes:
    """A report as one line."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(report, kind))
    return json.dumps({"kind": kind, **dataclasses.asdict(report)}).encode() + b"\n"


def from_line(line: bytes) -> Report:
    """The report in a line; raises `ValueError` for anything else."""
    try:
        fields: dict[str, Any] = json.loads(line)
        return _KINDS[fields.pop("kind")](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a report: {line[:100]!r}") from error
