"""What the servicers share: the model in service, the stored concepts, threads for host work."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from engine.batching.batcher import Batcher
from engine.planner import Planner
from engine.serving.deployment import Deployment
from engine.store.concept_store import ConceptStore

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What the servicers share."""

    deployment: Deployment
    store: ConceptStore
    pool: Executor  # for host work
    stall_timeout_s: float = 60.0  # a caller that reads nothing for so long is dropped
    progress_interval_s: float = 0.0  # between two steps of an image that a caller is told of

    @property
    def pipeline(self) -> Planner:
        """The planning half of the model in service; to plan a request for it, take a lease."""
        return self.deployment.current.planner

    @property
    def batcher(self) -> Batcher:
        """Of the model in service; to submit a request to it, take a lease."""
        return self.deployment.current.batcher

    async def in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        return await loop.run_in_executor(self.pool, lambda: context.run(function, *args, **kwargs))
