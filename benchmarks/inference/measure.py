"""One system beside OneWord: rounds in turn, so that a busy moment hits both; results compared."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inference.cases import SEED, Prepared
from benchmarks.inference.environments import versions_of
from benchmarks.inference.processes import Worker
from benchmarks.inference.systems import OURS, SystemSpec

PAUSE_S = 0.05  # in which idle threads of the other system stop spinning
MAX_ERROR = 1e-3  # of a float32 call, relative to the largest value
MIN_PSNR_DB = 40.0  # of a float32 image


class DifferentWork(Exception):
    """A float32 system gives something else, so that its time means nothing."""


def measure_beside_ours(spec: SystemSpec, prepared: Prepared, cache: Path) -> dict[str, Any]:
    """Times of both in ms, their ratio (above 1: OneWord is faster), and how far answers differ.

    Raises `MissingSystem`, `WorkerFailed` or `DifferentWork`.
    """
    case = prepared.case
    for one in (OURS, spec):
        one.settings_for(prepared, cache)  # before anything large is in memory
    with OURS.start(prepared, cache) as ours, spec.start(prepared, cache) as other:
        workers = (ours, other)
        differences = _compare(ours, other)
        _check(spec, differences)
        result: dict[str, Any] = {
            "precision": spec.precision,
            "versions": versions_of(spec.python(cache), spec.packages),
            **differences,
            "call": _in_turn(workers, "call", case.call_rounds, seed=SEED),
            "image": _in_turn(workers, "draw", case.image_rounds, seed=SEED),
            "peak_gflops": [_turn(ours, "peak")["gflops"] for _ in range(2)],
        }
    return result


def _compare(ours: Worker, other: Worker) -> dict[str, float]:
    for worker in (ours, other):
        for do in ("call", "draw"):
            _turn(worker, do, keep=True, seed=SEED)
    one, two = ours.result("call"), other.result("call")
    image, drawn = ours.result("draw"), other.result("draw")
    noise = float(np.mean((image - drawn) ** 2))
    return {
        "call_error": float(np.abs(one - two).max() / np.abs(one).max()),
        # Two roundings to 8 bits alone leave about 56 dB.
        "psnr_db": min(99.0, 10 * float(np.log10(1 / max(noise, 1e-12)))),
    }


def _check(spec: SystemSpec, found: dict[str, float]) -> None:
    if not spec.is_exact:
        return
    if not found["call_error"] <= MAX_ERROR or not found["psnr_db"] >= MIN_PSNR_DB:
        raise DifferentWork(
            f"a call is off by {found['call_error']:.1e} (limit {MAX_ERROR:.0e}), the image has "
            f"{found['psnr_db']:.1f} dB PSNR (limit {MIN_PSNR_DB:.0f} dB): not the same work"
        )


def _in_turn(
    workers: tuple[Worker, Worker], do: str, rounds: int, **details: Any
) -> dict[str, Any]:
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        turns = list(zip(workers, times, strict=True))
        for worker, kept in turns if number % 2 else reversed(turns):
            kept.append(_turn(worker, do, **details)["ms"])
    ratios = [other / ours for ours, other in zip(*times, strict=True)]
    return {
        "ours_ms": statistics.median(times[0]),
        "ms": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "rounds": rounds,
    }


def _turn(worker: Worker, do: str, **details: Any) -> dict[str, Any]:
    time.sleep(PAUSE_S)
    return worker.ask(do, **details)
