"""Step-level batching against static batching and against one at a time, under open-loop load.

All three drive the same `Pipeline` in this process (for ours `Batcher` itself, without gRPC), get
the same requests at the same times with the same deadlines, and have the same limits. The load is
a share of the capacity: what the mix makes one at a time in a closed loop, measured first and
again at the end, so that a machine that changed meanwhile shows.
"""

import copy
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

from tqdm import tqdm

from benchmarks.serving.mix import arrival_times, deadline_s, make_concepts, make_requests
from benchmarks.serving.open_loop import Arrival, Outcome, replay, summary
from benchmarks.serving.run_to_end import RunToEnd, Scheduler
from benchmarks.serving.settings import Settings
from engine.batching.batcher import Batcher, BatcherConfig
from engine.batching.cost_measurement import measure_costs, measuring_plan
from engine.batching.step_costs import CostTable
from engine.pipeline import Pipeline, sound
from engine.planner import GenerationPlan

LOADS = (0.5, 0.8, 1.0, 1.2)
OURS, STATIC, ONE_BY_ONE = "step-level", "static batching", "one at a time"
SYSTEMS = (OURS, STATIC, ONE_BY_ONE)
WINDOWS_S = (0.0, 0.05, 0.2)  # of static batching; the best one is measured
# Every point is measured twice, the second time with the systems in reverse order.
REPEATS = 2
COST_MEASUREMENT_S = 4.0
TUNING_LOAD, TUNING_SHARE = 0.8, 0.05  # of the time, for all windows
CONFIG = BatcherConfig(cost_measurement_s=COST_MEASUREMENT_S)

MakeScheduler = Callable[[CostTable], Scheduler]


def measure(settings: Settings) -> dict[str, Any]:
    bench = Bench(settings)
    before = bench.capacity()
    window_s, tried = bench.best_window(before)
    count = requests_in(settings.load_s * (1.0 - TUNING_SHARE), before, settings)
    runs = [
        (load, repeat, name)
        for load in LOADS
        for repeat in range(REPEATS)
        for name in SYSTEMS[:: 1 if repeat % 2 == 0 else -1]
    ]
    found: dict[tuple[float, str], list[list[Outcome]]] = {}
    for load, repeat, name in tqdm(runs, desc="load", unit="run"):
        make = bench.scheduler(name, window_s)
        outcomes = bench.run(make, load * before, count, seed=repeat)
        found.setdefault((load, name), []).append(outcomes)
    return {
        "capacity_per_s": before,
        "capacity_afterwards_per_s": bench.capacity(),
        "requests_of_a_run": count,
        "repeats": REPEATS,
        "mean_deadline_s": fmean(
            deadline_s(bench.alone_s(plan)) for plan in bench.plans(count, seed=0)
        ),
        "window_ms": 1e3 * window_s,
        "windows": tried,
        "step_ms_by_rows": {
            str(rows): bench.costs.steps.ms(bench.area, rows) for rows in (1, 2, 4, 8, 16)
        },
        "loads": {
            f"{load:g}": {name: summary(found[load, name]) for name in SYSTEMS} for load in LOADS
        },
    }


def requests_in(seconds: float, rate: float, settings: Settings) -> int:
    """Requests of a run such that all runs of all points take so long, whatever is refused."""
    runs = REPEATS * len(SYSTEMS) * sum(1.0 / load for load in LOADS)
    return max(min(int(seconds * rate / runs), settings.max_load_requests // REPEATS), 3)


class Bench:
    """The pipeline, warm, and what it costs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pipeline = Pipeline.open(settings.bundle)
        manifest = self._pipeline.bundle.manifest
        self._concepts = make_concepts(manifest.text.dim)
        self.area = manifest.latents.default_size**2
        self._draw_all_prompts()
        self.costs = measure_costs(self._pipeline, measuring_plan(self._pipeline), CONFIG)
        self._learn_sizes()

    def plans(self, count: int, *, seed: int) -> list[GenerationPlan]:
        requests = make_requests(count, self._concepts, seed=seed)
        return [self._pipeline.plan(request) for request in requests]

    def alone_s(self, plan: GenerationPlan) -> float:
        """What a request takes with nobody else there."""
        alone_ms = self.costs.alone_ms(
            area=plan.width * plan.height,
            rows=len(plan.weights),
            num_steps=len(plan.trajectory.rows),
        )
        return alone_ms / 1e3

    def capacity(self) -> float:
        """Images per second of the mix, one at a time, the next when the last is done."""
        plans = self.plans(self._settings.capacity_requests, seed=0)
        started = time.perf_counter()
        for plan in tqdm(plans, desc="capacity", unit="image", leave=False):
            self._draw(plan)
        return len(plans) / (time.perf_counter() - started)

    def scheduler(self, name: str, window_s: float) -> MakeScheduler:
        """A way to start one of the systems."""
        if name == OURS:
            return lambda costs: Batcher(self._pipeline, CONFIG, costs=costs)
        most = CONFIG.max_images_in_flight if name == STATIC else 1
        return lambda costs: RunToEnd(
            self._pipeline, CONFIG, costs=costs, max_images=most, window_s=window_s
        )

    def run(self, make: MakeScheduler, rate: float, count: int, *, seed: int) -> list[Outcome]:
        """One system under one load."""
        arrivals = [
            Arrival(
                plan=plan,
                at_s=at_s,
                allowed_s=deadline_s(self.alone_s(plan)),
                alone_s=self.alone_s(plan),
            )
            for plan, at_s in zip(
                self.plans(count, seed=seed), arrival_times(count, rate, seed=seed), strict=True
            )
        ]
        # Each begins with what was measured, and learns for itself.
        scheduler = make(copy.deepcopy(self.costs))
        try:
            outcomes = replay(scheduler.submit, arrivals)
        finally:
            scheduler.close()
        assert all(one.num_ends == 1 for one in outcomes), "a request ended twice"
        return outcomes

    def best_window(self, rate: float) -> tuple[float, dict[str, Any]]:
        """The window with the highest goodput of static batching; of equal ones, the fastest."""
        seconds = TUNING_SHARE * self._settings.load_s
        count = max(int(seconds * TUNING_LOAD * rate / len(WINDOWS_S)), 3)
        tried = dict[float, dict[str, Any]]()
        for window_s in tqdm(WINDOWS_S, desc="windows", unit="run", leave=False):
            make = self.scheduler(STATIC, window_s)
            # Not the requests that are measured afterwards.
            tried[window_s] = summary([self.run(make, TUNING_LOAD * rate, count, seed=REPEATS)])
        best = max(tried, key=lambda window_s: _merit(tried[window_s]))
        return best, {f"{1e3 * window_s:g}": one for window_s, one in tried.items()}

    def _draw(self, plan: GenerationPlan) -> None:
        images = self._pipeline.begin(plan)
        while not images[0].is_done:
            self._pipeline.step(images)
        sound(self._pipeline.decode(images))

    def _draw_all_prompts(self) -> None:
        """So that no system encodes a prompt for another."""
        for plan in self.plans(60, seed=0):
            self._pipeline.begin(plan)

    def _learn_sizes(self) -> None:
        """What the sizes cost that are not the model's own: drawn a few times, alone."""
        seen = set[tuple[int, int]]()
        for plan in self.plans(60, seed=0):
            key = (plan.width * plan.height, len(plan.weights))
            if key in seen:
                continue
            seen.add(key)
            images = self._pipeline.begin(plan)
            while not images[0].is_done:
                started = time.perf_counter()
                self._pipeline.step(images)
                self.costs.steps.observe(*key, 1e3 * (time.perf_counter() - started))
            for _ in range(3):
                started = time.perf_counter()
                self._pipeline.decode(images)
                self.costs.decodes.observe(key[0], 1, 1e3 * (time.perf_counter() - started))


def _merit(result: dict[str, Any]) -> tuple[float, float]:
    return (round(result["in_time_share"], 2), -result["latency_ms"].get("median", 0.0))
