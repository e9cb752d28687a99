"""What a process takes up: read at each truce, and judged by its trend."""

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The server's process at rest."""

    at_s: float  # since the soak began
    heap_bytes: int  # live: what malloc has given out and not got back
    resident_bytes: int
    descriptors: int
    threads: int
    tasks: int  # of asyncio
    worker_pid: int
    worker_resident_bytes: int
    given_up: int = 0  # calls until then (`Ledger.given_up`)


def resident_bytes(pid: int) -> int:
    return 1024 * _status(pid, "VmRSS")


def num_threads(pid: int) -> int:
    return _status(pid, "Threads")


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def children(pid: int) -> list[int]:
    found = list[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # threads end meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def _status(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Theil-Sen: the median slope between two points, which a few outliers do not move."""
    pairs = combinations(range(len(times)), 2)
    return statistics.median(
        (values[j] - values[i]) / (times[j] - times[i]) for i, j in pairs if times[j] > times[i]
    )


def growth(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """How much the trend of the second half adds up to, and how far values lie from that trend.

    The first half is for caches and pools to fill.
    """
    half = len(times) // 2
    late_times, late = times[half:], values[half:]
    if len(late) < 2:
        return 0.0, 0.0
    trend = slope(late_times, late)
    rests = [value - trend * at for at, value in zip(late_times, late, strict=True)]
    middle = statistics.median(rests)
    scatter = statistics.median(abs(rest - middle) for rest in rests)
    return trend * (late_times[-1] - late_times[0]), scatter
