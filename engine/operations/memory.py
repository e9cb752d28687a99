"""How much memory the server takes: this process, and those that it started."""

import os
from pathlib import Path

_PROC = Path("/proc")


def resident_bytes(pid: int | None = None) -> int:
    """Memory of a process; 0 where that is not told, or the process is gone."""
    try:
        pages = (_PROC / str(pid or os.getpid()) / "statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def children_resident_bytes() -> int:
    """Memory of all processes below this one: the model's and those that learn."""
    parents = _parents()
    return sum(resident_bytes(pid) for pid in parents if _is_below(pid, os.getpid(), parents))


def _parents() -> dict[int, int]:
    """The parent of each process."""
    try:
        pids = [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]
    except OSError:
        return {}
    found = dict[int, int]()
    for pid in pids:
        try:
            stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
            # A name may hold spaces and brackets: what follows the last one is sound.
            found[pid] = int(stat.rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    return found


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    for _ in range(len(parents)):  # the processes are read one by one: a ring is possible
        pid = parents.get(pid, 0)
        if pid in (0, ancestor):
            return pid == ancestor
    return False
