"""What was measured, part by part: kept as JSON as soon as it is there, with where and when."""

import datetime
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT
from benchmarks.run import machine
from engine.files import write_atomically

REPORT = ROOT / "docs" / "benchmarks" / "serving.json"
_MEASURED = (
    "engine",
    "protos",
    "oneword",
    "trainer",
    "benchmarks",
    "models",
)  # what figures depend on

Results = dict[str, dict[str, Any]]  # by part: "commit", "machine", "date", "seconds", "result"


def read_results(path: Path) -> Results:
    """The parts that a file has; none where there is no file."""
    return json.loads(path.read_text())["parts"] if path.is_file() else {}


def add_result(path: Path, part: str, result: dict[str, Any], *, seconds: float) -> Results:
    """Keep the result of a part beside those of the others; returns them all."""
    results = read_results(path)
    results[part] = {
        "commit": commit(),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "result": result,
    }
    content = json.dumps({"parts": results}, indent=1) + "\n"
    write_atomically(path, content.encode())
    return results


def is_current(entry: dict[str, Any] | None) -> bool:
    """Whether a part was measured with this code on this machine."""
    if entry is None or entry["commit"] != commit():
        return False
    here, there = machine(), entry["machine"]
    return all(here[key] == there[key] for key in ("processor", "cores", "memory_gb", "versions"))


def commit() -> str:
    """The commit of the checkout; with a digest of what was changed since, if anything was."""
    head = _git("rev-parse", "--short=12", "HEAD").strip()
    changes = _git("diff", "HEAD", "--", *_MEASURED)
    digest = hashlib.sha256(changes.encode()).hexdigest()[:8]
    return f"{head}+{digest}" if changes else head


def _git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
