"""What all systems of the load are given: one warm pipeline, its costs, requests and times.

The load is a share of the capacity: what the mix makes one at a time in a closed loop.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from benchmarks.serving.mix import arrival_times, deadline_s, make_concepts, make_requests
from benchmarks.serving.open_loop import Arrival, Outcome, replay
from benchmarks.serving.run_to_end import RunToEnd, Scheduler
from benchmarks.serving.settings import Settings
from engine.batching.batcher import Batcher, BatcherConfig
from engine.batching.cost_measurement import measure_costs, measuring_plan
from engine.pipeline import Pipeline, sound
from engine.planner import GenerationPlan

OURS, STATIC, ONE_BY_ONE = "step-level", "static batching", "one at a time"
SYSTEMS = (OURS, STATIC, ONE_BY_ONE)
CONFIG = BatcherConfig(cost_measurement_s=4.0)
MANY = 1 << 16


class Bench:
    """The pipeline, warm, and what it costs; callers with deadlines, or patient ones without."""

    def __init__(self, settings: Settings, *, is_patient: bool) -> None:
        self._settings, self._is_patient = settings, is_patient
        # Nobody who has the time is refused.
        most = MANY if is_patient else CONFIG.max_queued_images
        self._config = replace(CONFIG, max_queued_images=most)
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

    def arrivals(self, rate: float, count: int, *, seed: int) -> list[Arrival]:
        """The requests of the mix at random times, so many a second."""
        return [
            Arrival(
                plan=plan,
                at_s=at_s,
                allowed_s=math.inf if self._is_patient else deadline_s(self.alone_s(plan)),
                alone_s=self.alone_s(plan),
            )
            for plan, at_s in zip(
                self.plans(count, seed=seed), arrival_times(count, rate, seed=seed), strict=True
            )
        ]

    def run(
        self, system: str, arrivals: Sequence[Arrival], *, window_s: float = 0.0
    ) -> list[Outcome]:
        """What becomes of them in one of the systems; the window is that of static batching."""
        scheduler = self._start(system, window_s)
        try:
            outcomes = replay(scheduler.submit, arrivals)
        finally:
            scheduler.close()
        assert all(one.num_ends == 1 for one in outcomes), "a request ended twice"
        return outcomes

    def _start(self, system: str, window_s: float) -> Scheduler:
        """Each begins with the costs that were measured, and learns for itself."""
        costs = copy.deepcopy(self.costs)
        if system == OURS:
            return Batcher(self._pipeline, self._config, costs=costs)
        is_static = system == STATIC
        return RunToEnd(
            self._pipeline,
            self._config,
            costs=costs,
            max_images=self._config.max_images_in_flight if is_static else 1,
            window_s=window_s if is_static else 0.0,
        )

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
