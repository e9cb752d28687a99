"""The rules of the soak: what the log may hold, and what the process may take up.

Bounds, each for the trend over the second half of the truces (`gauges.growth`): the live heap may
grow by 1 MiB, resident memory by 32 MiB, or three times as much as single readings scatter, where
that is more; four times as much where that half has fewer than eight readings, in which caches
still fill. The heap may besides grow by what gRPC itself loses with each call that is given up.
Descriptors, threads and tasks at rest may be three more at the end than their median
before. The model's process may take 96 MiB more than when it was first seen.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.soak.gauges import Reading, growth

MIB = 1 << 20
HEAP_GROWTH = 1 * MIB
RESIDENT_GROWTH = 32 * MIB
LOST_BY_GRPC = 60  # bytes a call that is given up: grpc_alone.py finds 50
WORKER_GROWTH = 96 * MIB
SCATTER = 3.0
ENOUGH_READINGS = 8  # in the second half
SHORT = 4  # a soak with fewer of them has bounds that are so much wider
COUNT_GROWTH = 3
_TRACEBACK = re.compile(
    rb"Traceback \(most recent|was never (retrieved|awaited)|Exception ignored in|Fatal Python"
)
# The access log: method, then status.
_BUGS = re.compile(rb" (/[\w.]+/\w+|unknown) (INTERNAL|UNKNOWN|DATA_LOSS) ")


@dataclass
class LogWatch:
    """Looks through a log as it grows."""

    secrets: Sequence[bytes]
    position: int = 0

    def look(self, content: bytes) -> list[str]:
        """What is wrong with the part that was not seen yet."""
        new, self.position = content[self.position :], len(content)
        found = list[str]()
        if match := _TRACEBACK.search(new):
            found.append(f"the log has {_around(new, match.start())}")
        if match := _BUGS.search(new):
            found.append(f"the log has {_around(new, match.start())}")
        for secret in self.secrets:
            if secret in new:
                found.append(f"the log has a secret or a prompt: {_around(new, new.index(secret))}")
        return found


def _around(content: bytes, at: int) -> str:
    begin = content.rfind(b"\n", 0, at) + 1
    return repr(content[begin : at + 300].decode(errors="replace"))


def secrets_of(tokens: Iterable[str]) -> list[bytes]:
    """The halves of tokens that nobody may read; the other half is an id."""
    return [token.split("_")[2].encode() for token in tokens]


def judge_readings(readings: Sequence[Reading]) -> list[str]:
    """What grew that should not have."""
    found = list[str]()
    times = [reading.at_s for reading in readings]
    for name, bound in (("heap_bytes", HEAP_GROWTH), ("resident_bytes", RESIDENT_GROWTH)):
        values = [float(getattr(reading, name)) for reading in readings]
        grown, scatter = growth(times, values)
        widened = bound if len(readings) >= 2 * ENOUGH_READINGS else SHORT * bound
        if name == "heap_bytes" and readings:
            given_up = readings[-1].given_up - readings[len(readings) // 2].given_up
            widened += LOST_BY_GRPC * given_up
        allowed = max(widened, SCATTER * scatter)
        if grown > allowed:
            found.append(
                f"{name} grew by {grown / MIB:.2f} MiB over the second half, more than "
                f"{allowed / MIB:.2f} MiB"
            )
    for name in ("descriptors", "threads", "tasks"):
        counts = [int(getattr(reading, name)) for reading in readings]
        if len(counts) > 2 and counts[-1] > statistics.median(counts[1:-1]) + COUNT_GROWTH:
            found.append(f"{name} grew: {counts}")
    return found + _judge_workers(readings)


def _judge_workers(readings: Sequence[Reading]) -> list[str]:
    found = list[str]()
    first = dict[int, int]()
    for reading in readings:
        began = first.setdefault(reading.worker_pid, reading.worker_resident_bytes)
        if reading.worker_resident_bytes > began + WORKER_GROWTH:
            found.append(
                f"the model's process {reading.worker_pid} grew from {began / MIB:.0f} to "
                f"{reading.worker_resident_bytes / MIB:.0f} MiB"
            )
    return found
