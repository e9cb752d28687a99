"""What the batcher needs of a model, in this process or behind a worker process."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from engine.errors import NumericalError
from engine.planner import GenerationPlan
from engine.requests import RgbImage


@runtime_checkable
class InFlight(Protocol):
    """One image between `begin` and `decode`; the batcher reads these and nothing else."""

    @property
    def seed(self) -> int: ...
    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch that its next step takes: 2 where it is guided, else 1."""
        ...

    @property
    def shape_key(self) -> tuple[int, ...]:
        """Images with the same key can share a call."""
        ...

    @property
    def steps_done(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def is_done(self) -> bool: ...


@runtime_checkable
class Model(Protocol):
    """All of it is called on the batcher's worker thread, but for `hold`.

    Where the process behind a model is gone, a call raises `WorkerDied` and every image in flight
    is lost; `wait_ready` tells when there is a model again.
    """

    def begin(self, plan: GenerationPlan) -> Sequence[Any]:
        """The images (`InFlight`) of a request, at their first latents."""
        ...

    def step(self, images: Sequence[Any], *, again: bool = False) -> float | None:
        """Advance images of one shape by one step, in one call.

        `again`: the next call will be the same, unless `hold` is called; the model may begin with
        it unasked. Returns the seconds of the denoiser's call where the time until it returns
        does not tell, because it was begun before.
        """
        ...

    def hold(self) -> None:
        """The next call may be another one than was said; from any thread, at once."""
        ...

    def decode(self, images: Sequence[Any]) -> Sequence[RgbImage | NumericalError]:
        """Pictures of images of one shape; one that is not finite is an error for itself alone."""
        ...

    def preview(self, image: Any) -> RgbImage | None: ...

    def row_cost(self, image: Any) -> float:
        """Memory of one of its rows in a call, relative to the model's own size; at least 1."""
        ...

    def release(self, images: Sequence[Any]) -> None:
        """Forget images that will not be decoded."""
        ...

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until calls can succeed, at most so long; whether they can."""
        ...
