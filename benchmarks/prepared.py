"""What prepared graphs save: the start, and the memory of one process and of two.

    python -m benchmarks.prepared [BUNDLE] [--rounds N]

Loads all graphs of a bundle and calls its denoiser, each time in a fresh process: the bundle's own
graphs and the prepared ones in turns, then two processes at once. They are prepared in a folder of
its own, which goes at the end. Linux: memory is read from /proc/self/smaps_rollup.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.peers import BUNDLE, ROOT
from benchmarks.run import machine
from engine.bundle import Bundle
from engine.pipeline import open_sessions
from engine.preparing import random_feeds
from engine.sessions import CPU_PROVIDER
from oneword.cli import main as oneword

RESULT = ROOT / "docs" / "benchmarks" / "prepared.md"
CALLS = 5
WAYS = ("as in the bundle", "prepared")
MEMORY = {
    "Private": "private, MB",
    "Shared": "shared with another process, MB",
    "Pss": "its share of all, MB",
}


def load_and_call(bundle: Path) -> None:
    """What a fresh process does: load, call, tell, and wait until it may end."""
    started = time.perf_counter()
    opened = Bundle.open(bundle)
    verified = time.perf_counter()
    sessions = open_sessions(opened, CPU_PROVIDER)
    loaded = time.perf_counter()
    feeds, calls = random_feeds(opened, opened.manifest.components["denoiser"]), list[float]()
    for _ in range(CALLS):
        begun = time.perf_counter()
        sessions["denoiser"].run(feeds)
        calls.append(time.perf_counter() - begun)
    print("ready", flush=True)
    sys.stdin.readline()
    found = {
        "verify": verified - started,
        "load": loaded - verified,
        "call": median(calls),
        **memory(),
    }
    print(json.dumps(found), flush=True)
    sys.stdin.readline()


def memory() -> dict[str, float]:
    """Megabytes of this process: its own, shared, and its share of what is shared."""
    found: dict[str, float] = {"Private": 0.0, "Shared": 0.0, "Pss": 0.0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kb = line.split()[:2]
        for kind in ("Private", "Shared"):
            if name in (f"{kind}_Clean:", f"{kind}_Dirty:"):
                found[kind] += int(kb) / 1024
        if name == "Pss:":
            found["Pss"] = int(kb) / 1024
    return found


def measure(bundle: Path, cache: Path, *, processes: int) -> list[dict[str, float]]:
    """So many processes at once, on prepared graphs if the cache has them."""
    command = [sys.executable, "-m", "benchmarks.prepared", str(bundle), "--measured"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment, **pipe) for _ in range(processes)
    ]
    found = list[dict[str, float]]()
    for step in ("ready", "told", "over"):
        for process in running:
            assert process.stdin and process.stdout
            if step == "ready":
                assert process.stdout.readline() == "ready\n"
                continue
            print(file=process.stdin, flush=True)
            if step == "told":
                found.append(json.loads(process.stdout.readline()))
    assert all(process.wait() == 0 for process in running)
    return found


def page(bundle: Path, folder: Path, rounds: int) -> str:
    empty, cache = folder / "empty", folder / "cache"
    os.environ["XDG_CACHE_HOME"] = str(cache)
    started = time.perf_counter()
    assert oneword(["prepare", str(bundle)]) == 0
    prepare_s = time.perf_counter() - started
    alone: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in tqdm(range(rounds), desc="alone", unit="round"):
        for way, place in zip(WAYS, (empty, cache), strict=True):
            alone[way] += measure(bundle, place, processes=1)
    both = {
        way: measure(bundle, place, processes=2)
        for way, place in zip(WAYS, (empty, cache), strict=True)
    }
    sizes = [
        sum(f.stat().st_size for f in one.rglob("*") if f.is_file()) for one in (bundle, cache)
    ]
    info = machine()
    lines = [
        "# Prepared graphs",
        "",
        f"`python -m benchmarks.prepared BUNDLE`, {info['date']}, {info['processor']}, "
        f"{info['cores']} cores, {info['memory_gb']} GB, ONNX Runtime "
        f"{info['versions']['onnxruntime']}. A bundle of {sizes[0] / 1e6:,.0f} MB; "
        f"`oneword prepare` took {prepare_s:.0f} s and {sizes[1] / 1e6:,.0f} MB of disk. Fresh "
        f"processes in turns, medians of {rounds}; files in the page cache. Loading a prepared "
        "graph includes checking it against its SHA-256. Memory after "
        f"{CALLS} calls of two rows at half the model's own size.",
        "",
        "| | verify the bundle, s | load its graphs, s | a call, s "
        f"| {' | '.join(MEMORY.values())} |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, group in (("", alone), (", two at once", both)):
        for way in WAYS:
            middle = {k: median(one[k] for one in group[way]) for k in group[way][0]}
            numbers = [f"{middle[k]:.2f}" for k in ("verify", "load", "call")]
            numbers += [f"{middle[k]:,.0f}" for k in MEMORY]
            lines.append(f"| {way}{title} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?", default=BUNDLE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measured:
        load_and_call(arguments.bundle)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = page(arguments.bundle.resolve(), Path(folder), arguments.rounds)
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
