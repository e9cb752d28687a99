"""Step-level batching against static batching and against one at a time, under open-loop load.

All three drive the same `Pipeline` in this process (for ours `Batcher` itself, without gRPC), get
the same requests at the same times, and have the same limits. The load is a share of the capacity:
what the mix makes one at a time in a closed loop, measured first and again at the end, so that a
machine that changed meanwhile shows.

Measured twice. Callers who wait for ever tell the latency: all have their images from all systems,
so that nobody's p99 is the better for the requests that it refused. Callers with deadlines tell the
goodput: how many images come in time.
"""

from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from tqdm import tqdm

from benchmarks.serving.kept_runs import KeptRuns
from benchmarks.serving.load_bench import OURS, STATIC, SYSTEMS, Bench
from benchmarks.serving.mix import deadline_s
from benchmarks.serving.open_loop import Arrival, Outcome, counted, latencies_ms, summary
from benchmarks.serving.settings import Settings
from benchmarks.serving.spread import percentile_ratio

WINDOWS_S = (0.0, 0.05, 0.2)  # of static batching; the best one is measured
TUNING_LOAD = 0.8
TUNING_SHARE, MAX_TUNING_S = 0.05, 120.0  # of the time, for all windows
PERCENTS = {"p50": 50.0, "p90": 90.0, "p99": 99.0}

Points = dict[float, dict[str, list[list[Outcome]]]]  # by load and system, a list a run


def measure_latency(settings: Settings) -> dict[str, Any]:
    """With callers who wait for ever."""
    bench, kept = Bench(settings, is_patient=True), KeptRuns("latency", settings)
    result, points = _measure(
        bench, kept, settings.latency_s, settings.latency_runs, most=settings.max_run_requests
    )
    for load, systems in points.items():
        waits_ms = {
            name: [latencies_ms(counted(run)) for run in runs] for name, runs in systems.items()
        }
        for name, point in result["loads"][f"{load:g}"].items():
            point["ours_in_this"] = {
                share: asdict(percentile_ratio(waits_ms[OURS], waits_ms[name], percent))
                for share, percent in PERCENTS.items()
            }
    kept.discard()
    return result


def measure_goodput(settings: Settings) -> dict[str, Any]:
    """With deadlines."""
    bench, kept = Bench(settings, is_patient=False), KeptRuns("load", settings)
    result, _ = _measure(
        bench, kept, settings.load_s, settings.load_runs, most=settings.max_run_requests
    )
    kept.discard()
    plans = bench.plans(result["requests_of_a_run"], seed=0)
    return result | {"mean_deadline_s": fmean(deadline_s(bench.alone_s(plan)) for plan in plans)}


def _measure(
    bench: Bench, kept: KeptRuns, seconds: float, num_runs: Mapping[float, int], *, most: int
) -> tuple[dict[str, Any], Points]:
    """All points in about so long, with at most so many requests a run."""
    before: float = kept.get("capacity before", bench.capacity)
    tuning_s = min(TUNING_SHARE * seconds, MAX_TUNING_S)
    windows: dict[str, Any] = kept.get("windows", lambda: _try_windows(bench, tuning_s, before))
    window_ms = max(windows, key=lambda ms: _merit(windows[ms]))
    count = _requests_in(seconds - tuning_s, before, num_runs, most)
    points: Points = {load: {name: [] for name in SYSTEMS} for load in num_runs}
    # In rounds over all loads: a machine that changes meanwhile changes for all of them.
    runs = [
        (load, repeat, system)
        for repeat in range(max(num_runs.values()))
        for load in num_runs
        if repeat < num_runs[load]
        for system in SYSTEMS[:: 1 if repeat % 2 == 0 else -1]
    ]
    for load, repeat, system in tqdm(runs, desc="load", unit="run"):
        arrivals = bench.arrivals(load * before, count, seed=repeat)

        def run(system: str = system, arrivals: list[Arrival] = arrivals) -> list[Any]:
            outcomes = bench.run(system, arrivals, window_s=float(window_ms) / 1e3)
            return [one.times for one in outcomes]

        times = kept.get(f"{system} at {load:g}, run {repeat}", run)
        points[load][system].append(
            [Outcome.of(arrival, one) for arrival, one in zip(arrivals, times, strict=True)]
        )
    result = {
        "capacity_per_s": before,
        "capacity_afterwards_per_s": bench.capacity(),
        "requests_of_a_run": count,
        "runs": {f"{load:g}": number for load, number in num_runs.items()},
        "window_ms": float(window_ms),
        "windows": windows,
        "step_ms_by_rows": {
            str(rows): bench.costs.steps.ms(bench.area, rows) for rows in (1, 2, 4, 8, 16)
        },
        "loads": {
            f"{load:g}": {name: summary(runs) for name, runs in systems.items()}
            for load, systems in points.items()
        },
    }
    return result, points


def _requests_in(seconds: float, rate: float, num_runs: Mapping[float, int], most: int) -> int:
    """Requests of a run such that all runs of all points take so long, whatever is refused."""
    runs = len(SYSTEMS) * sum(number / load for load, number in num_runs.items())
    return max(min(int(seconds * rate / runs), most), 3)


def _try_windows(bench: Bench, seconds: float, rate: float) -> dict[str, Any]:
    """Static batching with each window, by its milliseconds."""
    count = max(int(seconds * TUNING_LOAD * rate / len(WINDOWS_S)), 3)
    # Not the requests that are measured afterwards.
    arrivals = bench.arrivals(TUNING_LOAD * rate, count, seed=1000)
    return {
        f"{1e3 * window_s:g}": summary([bench.run(STATIC, arrivals, window_s=window_s)])
        for window_s in tqdm(WINDOWS_S, desc="windows", unit="run", leave=False)
    }


def _merit(result: dict[str, Any]) -> tuple[float, float]:
    """The most images in time; of equal ones, the fastest."""
    return (round(result["in_time_share"], 2), -result["latency_ms"].get("median", 0.0))
