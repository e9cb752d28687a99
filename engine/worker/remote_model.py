"""A model in a process of its own, behind the words of the batcher (`engine.batching.model`).

Latents never cross: this side holds handles, and asks for a step by number. A process that dies
takes its images with it, and every call about them raises `WorkerDied`; they can be begun again
from their plans, and are then the same images. All calls may come from any thread, one at a time.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.batching.model import Span
from engine.bundle import Bundle
from engine.errors import BundleError, NumericalError, WorkerDied
from engine.guidance import GuidedCalls
from engine.planner import GenerationPlan, Planner
from engine.requests import Limits, RgbImage
from engine.worker.answers import error_from_body, identity_of
from engine.worker.process import WorkerCommand
from engine.worker.supervisor import OnState, WorkerConfig, WorkerSupervisor
from engine.worker.task_wire import task_to_message
from engine.worker.wire import Message


@dataclass(slots=True, eq=False, kw_only=True)
class RemoteImage:
    """The handle of an image in flight in a model's process."""

    image_id: int
    epoch: int  # of the process that has it
    seed: int
    all_rows: int
    guided_calls: GuidedCalls
    num_steps: int
    shape_key: tuple[int, ...]
    row_cost: float
    abandoned: deque[int]  # where its number goes when nobody knows it any more
    steps_done: int = 0

    @property
    def is_done(self) -> bool:
        return self.steps_done == self.num_steps

    @property
    def rows(self) -> int:
        """As `ImageInFlight.rows`."""
        return self.all_rows if self.is_done or self.steps_done in self.guided_calls else 1

    def __del__(self) -> None:
        self.abandoned.append(self.image_id)


class RemoteModel:
    """A model in a supervised process of its own."""

    def __init__(self, command: WorkerCommand, config: WorkerConfig | None = None) -> None:
        self._supervisor = WorkerSupervisor(command, config or WorkerConfig())
        self._ids = itertools.count()
        self._abandoned: deque[int] = deque()

    def launch(self) -> None:
        """Begin to load the bundle."""
        self._supervisor.launch()

    def start(self) -> str:
        """Wait until the bundle is loaded; returns its identity. Raises what loading raised."""
        return self._supervisor.start()

    def close(self) -> None:
        """End the process. Idempotent."""
        self._supervisor.close()

    def watch(self, on_state: OnState | None) -> None:
        """Tell whether it serves, and if not, why: now, and whenever that changes."""
        self._supervisor.watch(on_state)

    @property
    def state(self) -> tuple[bool, str]:
        """Whether it serves, and if not, why."""
        return self._supervisor.state

    @property
    def pid(self) -> int | None:
        """Of the process that serves now."""
        return self._supervisor.pid

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until it serves (again); False if it does not within `timeout_s`."""
        return self._supervisor.wait_ready(timeout_s)

    # What the batcher needs

    def begin(self, plan: GenerationPlan) -> list[RemoteImage]:
        task = plan.task
        message = task_to_message(task)
        epoch = self._supervisor.epoch
        ids = message.body["ids"] = [next(self._ids) for _ in task.seeds]
        answer = self._ask("begin", message, size=float(task.num_images), epoch=epoch)
        return [
            RemoteImage(
                image_id=image_id,
                epoch=epoch,
                seed=seed,
                all_rows=len(task.weights),
                guided_calls=task.guided_calls,
                num_steps=len(task.trajectory.rows),
                shape_key=tuple(answer.body["shape_key"]),
                row_cost=float(answer.body["row_cost"]),
                abandoned=self._abandoned,
            )
            for image_id, seed in zip(ids, task.seeds, strict=True)
        ]

    def step(self, images: Sequence[RemoteImage], *, at_most: int = 1) -> list[Span]:
        """As the batcher's word; returns when each call in the process began and ended."""
        size = sum(image.rows * image.row_cost for image in images)
        message = _about(images)
        message.body["at_most"] = at_most
        answer = self._ask("step", message, size=size, epoch=_epoch(images))
        calls = [(float(begin), float(end)) for begin, end in answer.body["calls"]]
        for image in images:
            image.steps_done += len(calls)
        return calls

    def hold(self) -> None:
        self._supervisor.hold()

    def decode(self, images: Sequence[RemoteImage]) -> list[RgbImage | NumericalError]:
        """As `ImageModel.decode`, once for each image: the process lets go of it."""
        size = sum(image.row_cost for image in images)
        answer = self._ask("decode", _about(images), size=size, epoch=_epoch(images))
        pictures = iter(answer.arrays)
        return [
            _numerical(error_from_body(fault)) if fault else next(pictures)
            for fault in answer.body["faults"]
        ]

    def preview(self, image: RemoteImage) -> RgbImage | None:
        message = Message({"id": image.image_id})
        pictures = self._ask("preview", message, epoch=image.epoch).arrays
        return pictures[0] if pictures else None

    def release(self, images: Sequence[RemoteImage]) -> None:
        """Free images that leave early; those of a dead process are free already."""
        alive = [image for image in images if image.epoch == self._supervisor.epoch]
        if alive:
            with suppress(WorkerDied):  # then they are free as well
                self._ask("release", _about(alive), epoch=alive[0].epoch)

    def row_cost(self, image: RemoteImage) -> float:
        return image.row_cost

    def count(self) -> int:
        """Images that the process holds."""
        return int(self._ask("count", Message({})).body["images"])

    def _ask(
        self, action: str, message: Message, *, size: float = 1.0, epoch: int | None = None
    ) -> Message:
        # Handles that were dropped without `release` or `decode`: a leak here is none there.
        forgotten = [self._abandoned.popleft() for _ in range(len(self._abandoned))]
        if forgotten:
            message.body["forgotten"] = forgotten
        try:
            return self._supervisor.ask(action, message, size=size, epoch=epoch)
        except WorkerDied:  # perhaps nobody was told; unknown numbers do no harm
            self._abandoned.extend(forgotten)
            raise


def _about(images: Sequence[RemoteImage]) -> Message:
    return Message({"ids": [image.image_id for image in images]})


def _epoch(images: Sequence[RemoteImage]) -> int:
    """Of the oldest: if one of them is gone, none can be advanced."""
    return min(image.epoch for image in images)


def _numerical(error: Exception) -> NumericalError:
    assert isinstance(error, NumericalError)
    return error


def open_remote(
    bundle_path: Path,
    *,
    backend: str = "cpu",
    limits: Limits | None = None,
    config: WorkerConfig | None = None,
    **command: Any,
) -> tuple[Planner, RemoteModel]:
    """Both halves of a model: the planner here, the graphs in a process of their own.

    Raises the errors of `Pipeline.open`, in its words.
    """
    config = config or WorkerConfig()
    words = WorkerCommand(bundle=bundle_path, backend=backend, niceness=config.niceness, **command)
    model = RemoteModel(words, config)
    model.launch()
    try:
        # Here and there at the same time: most of it is hashing large files.
        planner = Planner(Bundle.open(bundle_path), limits=limits or Limits())
        identity = model.start()
        if identity != identity_of(planner.bundle.manifest):
            raise BundleError(f"the bundle at {bundle_path} was changed while it was opened")
    except BaseException:
        model.close()
        raise
    return planner, model
