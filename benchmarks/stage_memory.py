"""Time and peak memory of each stage of a build, from its reports of progress."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_STATUS = Path("/proc/self/status")


@dataclass(slots=True)
class Stage:
    """What one stage took."""

    seconds: float
    peak_mb: int  # resident memory, files that are mapped into it included (VmHWM)
    peak_own_mb: int  # without those files, which the system can drop (RssAnon, 50 times a second)


@dataclass(slots=True)
class StageMemory:
    """A callback for the progress of `build_bundle`; Linux."""

    stages: dict[str, Stage] = field(default_factory=dict[str, Stage])
    _own_mb: int = 0
    _started: float = 0.0

    def __post_init__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == 0:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again, proc(5)
            self._own_mb, self._started = 0, time.monotonic()
        if done == total:
            own = max(self._own_mb, _megabytes("RssAnon"))
            taken = Stage(time.monotonic() - self._started, _megabytes("VmHWM"), own)
            self.stages[stage] = taken
            print(
                f"{stage}: {taken.seconds:.0f} s, peak {taken.peak_mb} MB, "
                f"without files {taken.peak_own_mb} MB",
                flush=True,
            )

    def _watch(self) -> None:
        while True:
            self._own_mb = max(self._own_mb, _megabytes("RssAnon"))
            time.sleep(0.02)


def _megabytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) // 1024
