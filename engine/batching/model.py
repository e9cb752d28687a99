"""What the batcher needs of a model, in this process or behind a worker process."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from engine.errors import NumericalError
from engine.planner import GenerationPlan
from engine.requests import RgbImage

# When a call began and ended, on `time.monotonic`: one clock for all processes of a machine.
Span = tuple[float, float]


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

    def step(self, images: Sequence[Any], *, at_most: int = 1) -> Sequence[Span] | None:
        """Advance images of one shape by a step, in one call of the denoiser.

        Where it takes long to ask, a model may make several such calls before it answers, all of
        the same rows: `at_most` so many, and none is begun after `hold`. How many it were, the
        images tell. Returns when each of them began and ended where that is known better than by
        when it was asked and has answered.
        """
        ...

    def hold(self) -> None:
        """No other call is to be begun unasked; from any thread, at once."""
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
