"""Peak memory and start-up time of each system, each in a fresh process."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT, Diffusers, OneWord, Work


def measure() -> dict[str, Any]:
    """Peak resident memory in MB and seconds to the first image, one process per system."""
    results: dict[str, Any] = {}
    for name in ("oneword", "diffusers eager"):
        command = [sys.executable, "-m", "benchmarks.memory", name]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        elapsed = time.perf_counter() - started
        results[name] = json.loads(done.stdout.splitlines()[-1]) | {"process_s": elapsed}
    return results


def main(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        peer = OneWord() if name == "oneword" else Diffusers(Path(folder))
        for seed in range(3):
            peer.draw([Work(seed=seed)])
    print(json.dumps({"peak_mb": peak_mb(), "torch_loaded": "torch" in sys.modules}))


def peak_mb() -> float:
    """VmHWM: unlike getrusage's ru_maxrss, it does not count the parent before exec."""
    return _status_mb("VmHWM")


def resident_mb() -> float:
    """What this process has in memory now."""
    return _status_mb("VmRSS")


def _status_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(sys.argv[1])
