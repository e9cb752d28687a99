"""Time of a step and memory at the same batch, beside diffusers' script; N words against one.

python -m benchmarks.learning.cost [--rounds N]

Each system in a fresh process with one thread, in turns; medians. On a machine with nothing else to
do. The result is docs/benchmarks/learning-cost.json, and beside it a page.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from benchmarks.learning import peer
from benchmarks.learning.judge import CONCEPTS
from benchmarks.learning.settings import PEER
from benchmarks.memory import peak_mb
from benchmarks.peers import MODEL, ROOT
from benchmarks.run import machine
from engine.files import write_atomically
from trainer.images import read_images
from trainer.learning import learn_together
from trainer.model import load_model
from trainer.options import LearnOptions
from trainer.quiet import quiet_libraries
from trainer.sampling import image_size

REPORT = ROOT / "docs" / "benchmarks" / "learning-cost.json"
BATCH, WARM_UP, STEPS = 8, 10, 30
WORDS = tuple(peer.INITIALIZERS)[:4]
OURS = {
    "oneword": ["float32", "1"],
    "oneword, bfloat16": ["bfloat16", "1"],
    f"oneword, {len(WORDS)} words together": ["float32", str(len(WORDS))],
}


def ours(precision: str, words: int) -> dict[str, float]:
    """Milliseconds of a step for each word, and the peak of this process."""
    torch.set_num_threads(1)
    quiet_libraries()
    model = load_model(str(MODEL), unet_dtype=getattr(torch, precision))
    images = [read_images(CONCEPTS / name, size=image_size(model)) for name in WORDS[:words]]
    # Evaluation is not the script's work: once, before the first step.
    options = LearnOptions(steps=1_000, batch_size=BATCH, eval_every=1_000)
    states = learn_together(model, images, [options] * words)
    for _ in range(WARM_UP):
        next(states)
    started = time.perf_counter()
    for _ in range(STEPS):
        next(states)
    seconds = time.perf_counter() - started
    return {"step_ms": 1e3 * seconds / STEPS / words, "peak_mb": peak_mb()}


def script() -> dict[str, float]:
    """The same of diffusers' script: from the times of its files, and its peak from outside."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        command = peer.command(
            WORDS[0], output, seed=0, steps=WARM_UP + STEPS, batch_size=BATCH, accumulation=1,
            save_steps=WARM_UP,
        )  # fmt: skip
        process = psutil.Popen(
            command, cwd=ROOT, env=peer.environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        status = Path(f"/proc/{process.pid}/status")
        peak = 0
        while process.poll() is None:
            peak = max(peak, _high_water(status))
            time.sleep(0.1)
        if process.returncode:
            sys.exit(f"the script ended with {process.returncode}")
        first, last = (
            (output / f"learned_embeds-steps-{step}.safetensors").stat().st_mtime
            for step in (WARM_UP, WARM_UP + STEPS)
        )
    return {"step_ms": 1e3 * (last - first) / STEPS, "peak_mb": peak / 1024}


def _high_water(status: Path) -> int:
    """VmHWM in KB; 0 once the process has ended."""
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) if lines else 0


def measure(rounds: int) -> dict[str, Any]:
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in (PEER, *OURS)}
    for _ in tqdm(range(rounds), desc="rounds"):
        taken[PEER].append(script())
        for name, told in OURS.items():
            command = [sys.executable, "-m", "benchmarks.learning.cost", "--ours", *told]
            done = subprocess.run(
                command, cwd=ROOT, env=peer.environment(), capture_output=True, text=True,
                check=True,
            )  # fmt: skip
            taken[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(one[key] for one in all_) for key in all_[0]}
        for name, all_ in taken.items()
    }


def page(results: dict[str, dict[str, float]], info: dict[str, Any], rounds: int) -> str:
    theirs = results[PEER]
    rows = [
        f"| {name} | {one['step_ms']:.0f} | {theirs['step_ms'] / one['step_ms']:.2f} | "
        f"{one['peak_mb']:.0f} | {theirs['peak_mb'] / one['peak_mb']:.2f} |"
        for name, one in results.items()
    ]
    return "\n".join(
        [
            "# What a step of learning costs",
            "",
            f"`python -m benchmarks.learning.cost`, {info['date']}, {info['processor']}, one "
            f"thread; torch {info['versions']['torch']}, diffusers "
            f"{info['versions']['diffusers']}. The embedded model, {BATCH} samples a step, "
            f"{STEPS} steps after {WARM_UP}; medians of {rounds} processes each, in turns. With "
            "several words a step is that of one of them.",
            "",
            "| system | ms a step | times faster | peak MB | times less |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each (%(default)s)")
    parser.add_argument("--ours", nargs=2, metavar=("PRECISION", "WORDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        precision, words = arguments.ours
        print(json.dumps(ours(precision, int(words))))
        return
    peer.check_script()
    info, results = machine(), measure(arguments.rounds)
    content = json.dumps({"machine": info, "results": results}, indent=1) + "\n"
    write_atomically(REPORT, content.encode())
    write_atomically(REPORT.with_suffix(".md"), page(results, info, arguments.rounds).encode())
    print(page(results, info, arguments.rounds))


if __name__ == "__main__":
    main()
