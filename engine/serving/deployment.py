"""The bundle in service, and how another takes over from it without a lost request.

A new bundle is loaded in a process beside the old one and tried out; then new requests go to the
new one, while the old one finishes what it has and is closed. What fails before that leaves all as
it was. Whoever plans and submits a request holds a lease on the bundle meanwhile: a plan is of one
model, and a batcher that has been told to close takes nothing more.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.batching.batcher import Batcher, BatcherConfig, Model
from engine.batching.cost_measurement import measure_costs, measuring_plan
from engine.batching.result_cache import ResultCache
from engine.batching.step_costs import CostTable
from engine.errors import DeploymentFailed, DeploymentUnderWay, EngineError, InvalidRequest
from engine.pipeline import sound
from engine.planner import Planner
from engine.requests import GenerationRequest, Limits
from engine.worker.remote_model import RemoteModel
from engine.worker.supervisor import OnState

logger = logging.getLogger(__name__)

RETIRE_TIMEOUT_S = 600.0
_LAST_CALL_S = 5.0

# Opens a bundle: who plans its requests, and who draws them (a pipeline is both).
OpenModel = Callable[[Path], tuple[Planner, Model]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """One bundle in service."""

    planner: Planner
    batcher: Batcher
    model: Model
    since: float = field(default_factory=time.time)  # seconds since the epoch, UTC

    def close(self, grace_s: float) -> None:
        """Finish what it has within `grace_s`, fail the rest, and free the model."""
        # The batcher waits for the call under way: one that hangs must not hold it for long.
        guard = threading.Timer(grace_s + _LAST_CALL_S, close_model, [self.model])
        guard.daemon = True
        guard.start()
        self.batcher.close(grace_s)
        guard.cancel()
        close_model(self.model)

    def watch(self, on_state: OnState | None) -> None:
        if isinstance(self.model, RemoteModel):
            self.model.watch(on_state)
        elif on_state:
            on_state(True, "")


@dataclass(slots=True, eq=False)
class _Tenure:
    served: Served
    leases: int = 0


class Deployment:
    """Holds the bundle in service; `deploy` puts another in its place."""

    def __init__(
        self,
        planner: Planner,
        model: Model,
        config: BatcherConfig,
        *,
        open_model: OpenModel,
        costs: CostTable | None = None,
        make_batcher: Callable[..., Batcher] = Batcher,
        retire_timeout_s: float = RETIRE_TIMEOUT_S,
    ) -> None:
        self._config = config
        self._open_model = open_model
        self._make_batcher = make_batcher
        self._retire_timeout_s = retire_timeout_s
        self._changed = threading.Condition()
        self._deploying = threading.Lock()
        self._on_state: OnState | None = None
        self._retiring: threading.Thread | None = None
        self._closing = False
        self._current = self._tenure(planner, model, costs)

    @property
    def current(self) -> Served:
        """To look at; to submit a request to it, take a `lease`."""
        return self._current.served

    @property
    def retiring(self) -> bool:
        """Whether the bundle before the current one still finishes its requests."""
        return self._retiring is not None and self._retiring.is_alive()

    @contextmanager
    def lease(self) -> Generator[Served]:
        """The bundle in service, which stays open until this ends, whatever is deployed."""
        with self._changed:
            tenure = self._current
            tenure.leases += 1
        try:
            yield tenure.served
        finally:
            with self._changed:
                tenure.leases -= 1
                self._changed.notify_all()

    def watch(self, on_state: OnState | None) -> None:
        """Tell whether the bundle in service serves: now, and whenever that changes."""
        with self._changed:
            self._on_state = on_state
            self._current.served.watch(on_state)

    def deploy(self, bundle: Path) -> None:
        """Put another bundle in service; returns when new requests go to it.

        Raises `DeploymentFailed`, which says why, and the bundle in service stays.
        """
        if not self._deploying.acquire(blocking=False):
            raise DeploymentUnderWay("another bundle is being deployed; wait until it is")
        try:
            if self.retiring:
                raise DeploymentFailed(
                    "the bundle before the one in service is finishing its requests, and memory "
                    "is for two models at most; try again when it is done"
                )
            self._replace(self._tenure(*self._open(bundle)))
        finally:
            self._deploying.release()

    def wait_retired(self, timeout_s: float) -> bool:
        """Wait until the bundle that was replaced is closed."""
        if self._retiring:
            self._retiring.join(timeout_s)
        return not self.retiring

    def close(self, grace_s: float = 0.0) -> None:
        """Finish what there is within `grace_s`, fail the rest, and free the models."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._current.served.close(grace_s)
        if self._retiring:
            self._retiring.join()

    def _tenure(self, planner: Planner, model: Model, costs: CostTable | None) -> _Tenure:
        results = None
        if self._config.result_cache_bytes:
            identity = planner.bundle.manifest.to_json()
            results = ResultCache(self._config.result_cache_bytes, bundle_identity=identity)
        batcher = self._make_batcher(model, self._config, costs=costs, results=results)
        return _Tenure(Served(planner=planner, batcher=batcher, model=model))

    def _open(self, bundle: Path) -> tuple[Planner, Model, CostTable | None]:
        serving = self.current.planner.bundle.manifest.model_name
        try:
            planner, model = self._open_model(bundle)
            try:
                try_out(planner, model)
                return planner, model, measured(planner, model, self._config)
            except BaseException:
                close_model(model)
                raise
        except Exception as error:
            if not isinstance(error, EngineError):
                logger.exception("the bundle at %s cannot take over", bundle)
            raise DeploymentFailed(
                f"the bundle at {bundle} cannot take over, {serving} goes on serving: {error}"
            ) from error

    def _replace(self, new: _Tenure) -> None:
        with self._changed:
            closing, old = self._closing, self._current
            if not closing:
                old.served.watch(None)
                self._current = new
                new.served.watch(self._on_state)
        if closing:
            new.served.close(0.0)
            raise DeploymentFailed("the server is shutting down")
        logger.info("%s took over", new.served.planner.bundle.manifest.model_name)
        self._retiring = threading.Thread(
            target=self._retire, args=(old,), name="retiring bundle", daemon=True
        )
        self._retiring.start()

    def _retire(self, old: _Tenure) -> None:
        deadline = time.monotonic() + self._retire_timeout_s
        with self._changed:
            self._changed.wait_for(
                lambda: not old.leases or self._closing, timeout=self._retire_timeout_s
            )
            closing = self._closing
        grace_s = 0.0 if closing else max(deadline - time.monotonic(), 0.0)
        old.served.close(grace_s)
        logger.info("%s, replaced, is closed", old.served.planner.bundle.manifest.model_name)


def measured(planner: Planner, model: Model, config: BatcherConfig) -> CostTable | None:
    """What calls take on this device; None where that is left to the batcher to learn."""
    if not config.cost_measurement_s:
        return None
    return measure_costs(model, measuring_plan(planner), config)


def close_model(model: Model) -> None:
    """End the process of a model that has one."""
    if isinstance(model, RemoteModel):
        model.close()


def try_out(planner: Planner, model: Model) -> None:
    """Draw one picture in the fewest steps; raises what fails.

    Of half the model's own size, which is the quickest; of its own where plans take no other.
    """
    spec = planner.bundle.manifest.latents
    half = max(spec.default_size // 2 // spec.size_multiple, 1) * spec.size_multiple
    try:
        _draw_one(planner, model, half)
    except InvalidRequest:
        _draw_one(planner, model, spec.default_size)


def _draw_one(planner: Planner, model: Model, side: int) -> None:
    tables = planner.bundle.sampler_tables
    sampler = min(tables)
    steps = 1 + int(np.argmax(~np.isnan(tables[sampler].init_sigma)))
    request = GenerationRequest(
        prompt="", width=side, height=side, sampler=sampler, num_inference_steps=steps
    )
    # What callers may ask for is no matter here.
    images = model.begin(Planner(planner.bundle, limits=Limits()).plan(request))
    while not images[0].is_done:
        model.step(images)
    sound(model.decode(images))
