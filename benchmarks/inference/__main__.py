"""One image on this CPU: OneWord's backends beside diffusers, torch.compile and optimum-onnx.

python -m benchmarks.inference [--cases embedded,256] [--systems NAMES] [--cache FOLDER] [--again]

Same weights, same steps, same seed; a float32 system whose answers differ is not compared. Each
system runs in a process of its own and is measured in turn with OneWord, which gives the ratio;
optimum-onnx runs in an environment that pip makes under the cache folder. A system that
cannot be had is named with the reason. `--cases 512` is left out unless asked for. Random weights
of Stable Diffusion 1.5's size take about 12 GB of memory and 25 GB of disk. What was measured with
this code on this machine is not measured again, so that a benchmark that was stopped goes on.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.inference.cases import CASES, Case, Prepared, prepare
from benchmarks.inference.environments import MissingSystem
from benchmarks.inference.figure import draw_figure
from benchmarks.inference.measure import DifferentWork, measure_beside_ours
from benchmarks.inference.page import QUALITY, page
from benchmarks.inference.processes import WorkerFailed
from benchmarks.inference.quality import measure_quality
from benchmarks.inference.systems import SYSTEMS, SystemSpec
from benchmarks.peers import ROOT
from benchmarks.serving.results import add_result, is_current, read_results
from engine.files import write_atomically
from trainer.quiet import quiet_libraries
from trainer.tradeoff_figure import figure_png

REPORT = ROOT / "docs" / "benchmarks" / "inference.json"


def main() -> int:
    arguments = _parser().parse_args()
    quiet_libraries()
    for name in arguments.cases:
        _measure_case(CASES[name], arguments)
    print(write_page(arguments.output))
    return 0


def _measure_case(case: Case, arguments: argparse.Namespace) -> None:
    prepared = prepare(case, arguments.cache)
    for spec in SYSTEMS:
        part = f"{case.name}/{spec.name}"
        if spec.name not in arguments.systems:
            continue
        known = read_results(arguments.output).get(part)
        if known and "missing" not in known["result"] and is_current(known) and not arguments.again:
            print(f"{part}: measured before; --again measures it anew", file=sys.stderr)
            continue
        started = time.monotonic()
        result = _result(spec, prepared, arguments.cache)
        result["gflop"] = prepared.call_gflop()
        add_result(arguments.output, part, result, seconds=time.monotonic() - started)
        print(f"{part}: {result.get('missing') or result['image']}", file=sys.stderr)
    if not case.is_full_size and "OneWord int8" in arguments.systems:
        _measure_quality(prepared, arguments)


def _measure_quality(prepared: Prepared, arguments: argparse.Namespace) -> None:
    if not arguments.again and is_current(read_results(arguments.output).get(QUALITY)):
        return
    started = time.monotonic()
    result = measure_quality(prepared)
    add_result(arguments.output, QUALITY, result, seconds=time.monotonic() - started)


def _result(spec: SystemSpec, prepared: Prepared, cache: Path) -> dict[str, Any]:
    try:
        return measure_beside_ours(spec, prepared, cache)
    except (MissingSystem, WorkerFailed, DifferentWork) as reason:
        return {"missing": str(reason), "precision": spec.precision}


def write_page(output: Path) -> str:
    """The page and the figure beside the results."""
    results = read_results(output)
    figure = output.with_suffix(".png")
    write_atomically(figure, figure_png(draw_figure(results)))
    text = page(results, figure.name)
    write_atomically(output.with_suffix(".md"), text.encode())
    return text


def _parser() -> argparse.ArgumentParser:
    names = [spec.name for spec in SYSTEMS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cases",
        type=lambda text: _chosen(text, list(CASES)),
        default=["embedded", "256"],
        metavar="NAMES",
        help=f"with commas, of {', '.join(CASES)} (embedded,256)",
    )
    parser.add_argument(
        "--systems",
        type=lambda text: _chosen(text, names),
        default=names,
        metavar="NAMES",
        help=f"with commas, of {', '.join(names)} (all)",
    )
    parser.add_argument(
        "--cache",
        type=lambda text: Path(text).resolve(),
        default=ROOT / "build" / "inference",
        metavar="FOLDER",
        help="models, bundles and environments (build/inference)",
    )
    parser.add_argument("--output", type=Path, default=REPORT, help="JSON; the page is beside it")
    parser.add_argument("--again", action="store_true", help="measure also what was measured")
    return parser


def _chosen(text: str, names: list[str]) -> list[str]:
    chosen = [one.strip() for one in text.split(",")]
    if unknown := [one for one in chosen if one not in names]:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; one of {', '.join(names)}"
        )
    return chosen


if __name__ == "__main__":
    sys.exit(main())
