"""Step-level batching against static batching and against one at a time, under open-loop load.

All three drive the same `Pipeline` in this process (for ours `Batcher` itself, without gRPC), get
the same requests at the same times, and have the same limits. The load is a share of the capacity:
what the mix makes one at a time in a closed loop, measured first and again at the end, so that a
machine that changed meanwhile shows.

Measured twice. Callers who wait for ever tell the latency: all have their images from all systems,
so that nobody's p99 is the better for the requests that it refused. Callers with deadlines tell the
goodput: how many images come in time.
"""

from statistics import fmean
from typing import Any

from tqdm import tqdm

from benchmarks.serving.load_bench import STATIC, SYSTEMS, Bench
from benchmarks.serving.mix import deadline_s
from benchmarks.serving.open_loop import Outcome, summary
from benchmarks.serving.settings import Settings

LOADS = (0.5, 0.8, 1.0, 1.2)
# Every point is measured twice, the second time with the systems in reverse order.
REPEATS = 2
WINDOWS_S = (0.0, 0.05, 0.2)  # of static batching; the best one is measured
TUNING_LOAD, TUNING_SHARE = 0.8, 0.05  # of the time, for all windows


def measure_latency(settings: Settings) -> dict[str, Any]:
    """With callers who wait for ever."""
    bench = Bench(settings, is_patient=True)
    return _measure(bench, settings.latency_s, settings.max_latency_requests)


def measure_goodput(settings: Settings) -> dict[str, Any]:
    """With deadlines."""
    bench = Bench(settings, is_patient=False)
    count = settings.max_load_requests
    return _measure(bench, settings.load_s, count) | {
        "mean_deadline_s": fmean(
            deadline_s(bench.alone_s(plan)) for plan in bench.plans(count, seed=0)
        ),
    }


def _measure(bench: Bench, seconds: float, most: int) -> dict[str, Any]:
    """All points in about so long, with at most so many requests each."""
    before = bench.capacity()
    window_s, tried = _best_window(bench, TUNING_SHARE * seconds, before)
    count = _requests_in((1.0 - TUNING_SHARE) * seconds, before, most)
    runs = [
        (load, repeat, system)
        for load in LOADS
        for repeat in range(REPEATS)
        for system in SYSTEMS[:: 1 if repeat % 2 == 0 else -1]
    ]
    found: dict[tuple[float, str], list[list[Outcome]]] = {}
    for load, repeat, system in tqdm(runs, desc="load", unit="run"):
        outcomes = bench.run(system, load * before, count, seed=repeat, window_s=window_s)
        found.setdefault((load, system), []).append(outcomes)
    return {
        "capacity_per_s": before,
        "capacity_afterwards_per_s": bench.capacity(),
        "requests_of_a_run": count,
        "repeats": REPEATS,
        "window_ms": 1e3 * window_s,
        "windows": tried,
        "step_ms_by_rows": {
            str(rows): bench.costs.steps.ms(bench.area, rows) for rows in (1, 2, 4, 8, 16)
        },
        "loads": {
            f"{load:g}": {system: summary(found[load, system]) for system in SYSTEMS}
            for load in LOADS
        },
    }


def _requests_in(seconds: float, rate: float, most: int) -> int:
    """Requests of a run such that all runs of all points take so long, whatever is refused."""
    runs = REPEATS * len(SYSTEMS) * sum(1.0 / load for load in LOADS)
    return max(min(int(seconds * rate / runs), most // REPEATS), 3)


def _best_window(bench: Bench, seconds: float, rate: float) -> tuple[float, dict[str, Any]]:
    """The window with the most images of static batching in time; of equal ones, the fastest."""
    count = max(int(seconds * TUNING_LOAD * rate / len(WINDOWS_S)), 3)
    tried = dict[float, dict[str, Any]]()
    for window_s in tqdm(WINDOWS_S, desc="windows", unit="run", leave=False):
        # Not the requests that are measured afterwards.
        outcomes = bench.run(STATIC, TUNING_LOAD * rate, count, seed=REPEATS, window_s=window_s)
        tried[window_s] = summary([outcomes])
    best = max(tried, key=lambda window_s: _merit(tried[window_s]))
    return best, {f"{1e3 * window_s:g}": one for window_s, one in tried.items()}


def _merit(result: dict[str, Any]) -> tuple[float, float]:
    return (round(result["in_time_share"], 2), -result["latency_ms"].get("median", 0.0))
