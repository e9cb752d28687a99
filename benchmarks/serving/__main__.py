"""What the server costs and promises under load: overhead, batching, cancels, refusals, memory.

python -m benchmarks.serving [--parts NAMES] [--again] [--requests N] [--latency-seconds S]
                             [--load-seconds S]

Seven parts, two hours together on two cores with nothing else to do; latency takes 95 minutes:
  overhead  one image through the server, beside the pipeline in process
  latency   Poisson arrivals at 50 to 120 % of capacity: step-level batching, static batching with
            its best window, one at a time; callers wait for ever
  load      the same with deadlines: how many images come in time
  cancel    from a caller's cancel to a free slot
  shed      how soon a loaded server refuses
  publish   from the import of a concept to its first use, with two servers on one store
  heap      memory over many requests, a third cancelled, some broken

Each result is kept in docs/benchmarks/serving.json as soon as it is there, and beside it the page
and the figure, which say how to read them. What was measured with this code on this machine is not
measured again, and each run of latency and load is kept in build/serving as soon as it is over, so
that a benchmark that was stopped goes on. `--quick` tries all of it in a few
minutes and writes nowhere unless `--output` says where: its figures mean nothing.
"""

import argparse
import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import BUNDLE, MODEL
from benchmarks.serving import cancel, heap, load, overhead, publish, shed
from benchmarks.serving.load_figure import draw_load_figure
from benchmarks.serving.page import page
from benchmarks.serving.results import REPORT, Results, add_result, is_current, read_results
from benchmarks.serving.settings import Settings
from engine.files import write_atomically
from trainer.tradeoff_figure import figure_png

PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "overhead": overhead.measure,
    "latency": load.measure_latency,
    "load": load.measure_goodput,
    "cancel": cancel.measure,
    "shed": shed.measure,
    "publish": publish.measure,
    "heap": heap.measure,
}
LOAD_PARTS = ("latency", "load")


def main() -> int:
    arguments = _parser().parse_args()
    settings, output = _settings(arguments), _output(arguments)
    failed = list[str]()
    for part in arguments.parts:
        if not arguments.again and is_current(read_results(output).get(part)):
            print(f"{part}: measured before; --again measures it anew", file=sys.stderr)
            continue
        started = time.monotonic()
        try:
            result = PARTS[part](settings)
            results = add_result(output, part, result, seconds=time.monotonic() - started)
            write_page(output, results)
        except Exception:  # the other parts are worth having
            traceback.print_exc()
            failed.append(part)
    if results := read_results(output):
        print(write_page(output, results))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def write_page(output: Path, results: Results) -> str:
    """The page and the figure beside the results."""
    figure = output.with_name(f"{output.stem}-load.png")
    measured = {part: results[part]["result"]["loads"] for part in LOAD_PARTS if part in results}
    if len(measured) == len(LOAD_PARTS):
        write_atomically(figure, figure_png(draw_load_figure(**measured)))
    text = page(results, figure.name)
    write_atomically(output.with_suffix(".md"), text.encode())
    return text


def _settings(arguments: argparse.Namespace) -> Settings:
    bundle: Path | None = arguments.bundle
    if bundle is None:
        from trainer.export import build_bundle

        build_bundle(str(MODEL), BUNDLE, precision="fp32")
    settings = Settings.trial() if arguments.quick else Settings()
    given = {
        "bundle": bundle,
        "heap_requests": arguments.requests,
        "latency_s": arguments.latency_seconds,
        "load_s": arguments.load_seconds,
    }
    return dataclasses.replace(settings, **{k: v for k, v in given.items() if v is not None})


def _output(arguments: argparse.Namespace) -> Path:
    if arguments.output is None and arguments.quick:
        import tempfile

        return Path(tempfile.mkdtemp(prefix="oneword-bench-")) / REPORT.name
    return arguments.output or REPORT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        type=_parts,
        default=list(PARTS),
        metavar="NAMES",
        help=f"with commas, of {', '.join(PARTS)} (all)",
    )
    parser.add_argument("--again", action="store_true", help="measure also what was measured")
    parser.add_argument("--requests", type=int, help="of the heap (10000)")
    for part, seconds in (("latency", Settings().latency_s), ("load", Settings().load_s)):
        parser.add_argument(
            f"--{part}-seconds", type=_seconds, help=f"for all its points together ({seconds:g})"
        )
    parser.add_argument("--bundle", type=Path, help="folder (default: built from models/emoji)")
    parser.add_argument("--output", type=Path, help="JSON file (docs/benchmarks/serving.json)")
    parser.add_argument("--quick", action="store_true", help="see whether everything runs")
    return parser


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0.0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is no time to measure in: give seconds, as 60")
    return seconds


def _parts(value: str) -> list[str]:
    names = value.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
