"""A model that is arithmetic on a clock that a test holds, and the step loop on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.batching.config import BatcherConfig
from engine.batching.events import Event, Failed, Finished, ImageDone, StepDone
from engine.batching.jobs import Job
from engine.batching.result_cache import ResultCache
from engine.batching.step_costs import CostTable
from engine.batching.step_loop import StepLoop
from engine.errors import NumericalError, WorkerDied
from engine.planner import GenerationPlan
from engine.prompts import PromptReport
from engine.requests import GenerationRequest, RgbImage
from engine.samplers import StepCoefficients, Trajectory

ROW = StepCoefficients(0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, (1.0,))
REPORT = PromptReport(matched=(), num_tokens=0, num_chunks=1, cut="")
AREA = 64  # of the images that `plan` asks for unless told otherwise
Milliseconds = Callable[[int, int], float]  # of an area and a count


def plan(steps: int = 3, *, side: int = 8, rows: int = 2, **fields: Any) -> GenerationPlan:
    request: dict[str, Any] = {"prompt": "p", "num_inference_steps": steps, **fields}
    return GenerationPlan(
        request=GenerationRequest(**request),
        width=side,
        height=side,
        trajectory=Trajectory(rows=(ROW,) * steps, init_sigma=1.0),
        texts=(),
        weights=(1.0 / rows,) * rows,
        prompt_report=REPORT,
        negative_report=None,
    )


class Clock:
    """Time that passes when something says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_ms(self, ms: float) -> None:
        self.now += ms / 1e3


@dataclass(eq=False, slots=True)
class ToyImage:
    """What the batcher may know of an image, and nothing else."""

    seed: int
    rows: int
    side: int
    num_steps: int
    life: int  # of the worker that has it
    steps_done: int = 0

    @property
    def shape_key(self) -> tuple[int, ...]:
        return (self.side, self.side, 4)

    @property
    def is_done(self) -> bool:
        return self.steps_done == self.num_steps


def linear(area: int, count: int) -> float:
    return area / AREA * count


def flat(area: int, count: int) -> float:
    return area / AREA


class ToyModel:
    """Calls take the time that a function says; `live` are the images that it still holds."""

    def __init__(
        self, clock: Clock, step_ms: Milliseconds = flat, decode_ms: Milliseconds = linear
    ) -> None:
        self.clock = clock
        self.step_ms, self.decode_ms = step_ms, decode_ms
        self.live: set[ToyImage] = set()
        self.calls: list[list[int]] = []  # seeds in each denoiser call
        self.log: list[str] = []  # what was called, in order
        self.goes_on = False  # whether it makes several calls where it may
        self.at_most: list[int] = []  # how many it might, each time that it was asked
        self.after_call: Callable[[], None] = lambda: None
        self.num_holds = 0
        self.begin_ms = 0.0
        self.life = 0  # workers so far
        self.deadly_seeds: set[int] = set()  # a step of these kills the worker
        self.broken_seeds: set[int] = set()  # a step of these fails
        self.dies_next = False
        self.polls_until_ready = 0
        self.nan_seeds: set[int] = set()
        self.most_rows = 0

    def begin(self, plan: GenerationPlan) -> list[ToyImage]:
        self._enter("begin")
        self.clock.pass_ms(self.begin_ms)
        images = [
            ToyImage(
                seed=plan.request.seed + index,
                rows=len(plan.weights),
                side=plan.width,
                num_steps=len(plan.trajectory.rows),
                life=self.life,
            )
            for index in range(plan.request.num_images)
        ]
        self.live.update(images)
        return images

    def hold(self) -> None:
        self.num_holds += 1

    def step(self, images: Sequence[ToyImage], *, at_most: int = 1) -> None:
        self._enter("step", images)
        self.at_most.append(at_most)
        assert at_most >= 1
        assert len({image.shape_key for image in images}) == 1
        holds = self.num_holds
        for _ in range(at_most if self.goes_on else 1):
            self._call(images)
            self.after_call()
            if self.num_holds > holds:
                return

    def _call(self, images: Sequence[ToyImage]) -> None:
        assert not any(image.is_done for image in images)
        self.calls.append([image.seed for image in images])
        if self.deadly_seeds & {image.seed for image in images}:
            self._die()
        if self.broken_seeds & {image.seed for image in images}:
            raise RuntimeError("out of memory")
        rows = sum(image.rows for image in images)
        if len(images) > 1:
            cost = sum(image.rows * self.row_cost(image) for image in images)
            self.most_rows = max(self.most_rows, int(cost))
        self.clock.pass_ms(self.step_ms(images[0].side ** 2, rows))
        for image in images:
            image.steps_done += 1

    def decode(self, images: Sequence[ToyImage]) -> list[RgbImage | NumericalError]:
        self._enter("decode", images)
        assert len({image.shape_key for image in images}) == 1
        assert all(image.is_done for image in images)
        self.clock.pass_ms(self.decode_ms(images[0].side ** 2, len(images)))
        self.live.difference_update(images)
        return [
            NumericalError("not finite")
            if image.seed in self.nan_seeds
            else np.full((2, 2, 3), image.seed % 256, np.uint8)
            for image in images
        ]

    def preview(self, image: ToyImage) -> RgbImage | None:
        self._enter("preview", [image])
        return np.full((1, 1, 3), image.steps_done, np.uint8)

    def row_cost(self, image: ToyImage) -> float:
        return max(1.0, (image.side**2 / AREA) ** 2)

    def release(self, images: Sequence[ToyImage]) -> None:
        self._enter("release", images)
        self.live.difference_update(images)

    def wait_ready(self, timeout_s: float) -> bool:
        self.polls_until_ready -= 1
        return self.polls_until_ready < 0

    def _enter(self, name: str, images: Sequence[ToyImage] = ()) -> None:
        self.log.append(name)
        assert all(image in self.live for image in images), "an image that the model has not"
        if self.dies_next:
            self._die()

    def _die(self) -> None:
        self.dies_next = False
        self.live.clear()
        self.life += 1
        raise WorkerDied("the worker died; its requests begin again")


@dataclass
class Heard:
    """The events of one request; every rule about them is checked as they come."""

    job: Job | None = None
    events: list[Event] = field(default_factory=list[Event])
    deadline_at_the_end: float | None = None  # which others may change later

    def __call__(self, event: Event) -> None:
        assert not self.is_over, "an event after the last one"
        if self.job is not None:
            self.deadline_at_the_end = self.job.deadline
        if isinstance(event, ImageDone):
            assert event.image_index not in self.images, "an image that was told already"
        self.events.append(event)

    @property
    def is_over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)

    @property
    def images(self) -> dict[int, ImageDone]:
        return {e.image_index: e for e in self.events if isinstance(e, ImageDone)}

    @property
    def num_steps(self) -> int:
        return sum(isinstance(event, StepDone) for event in self.events)

    @property
    def error(self) -> Exception | None:
        last = self.events[-1] if self.events else None
        return last.error if isinstance(last, Failed) else None

    @property
    def is_finished(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished)


def table_of(
    step_ms: Milliseconds,
    decode_ms: Milliseconds = linear,
    *,
    counts: Sequence[int] = (1, 2, 4, 8, 16),
    areas: Sequence[int] = (AREA,),
) -> CostTable:
    """What measuring a toy model on a quiet machine would find."""
    return CostTable.of(
        {(area, count): step_ms(area, count) for area in areas for count in counts},
        {(area, count): decode_ms(area, count) for area in areas for count in counts},
        learns=False,
    )


class Rig:
    """A step loop on a toy model; by default with a table that is right."""

    def __init__(
        self,
        *,
        step_ms: Milliseconds = flat,
        decode_ms: Milliseconds = linear,
        costs: CostTable | None = None,
        results: ResultCache | None = None,
        **config: Any,
    ) -> None:
        self.clock = Clock()
        self.model = ToyModel(self.clock, step_ms, decode_ms)
        self.loop = StepLoop(
            self.model,
            BatcherConfig(**config),
            costs or table_of(step_ms, decode_ms),
            results,
            clock=self.clock,
        )

    def submit(self, steps: int = 3, *, within_ms: float | None = None, **fields: Any) -> Heard:
        """Hand in a request; `within_ms` is its deadline from now."""
        heard = Heard()
        options = {k: fields.pop(k) for k in ("priority", "tenant", "result_keys") if k in fields}
        deadline = None if within_ms is None else self.clock.now + within_ms / 1e3
        heard.job = self.loop.submit(plan(steps, **fields), heard, deadline=deadline, **options)
        return heard

    def run(self, max_ticks: int = 10_000) -> int:
        """Tick until nothing is left; how many ticks that took."""
        for tick in range(max_ticks):
            if not self.loop.has_work:
                return tick
            self.loop.tick()
        raise AssertionError(f"work is left after {max_ticks} ticks: {self.loop.load}")
