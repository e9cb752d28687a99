"""How well each service is: grpc.health.v1 with Watch, and the same for probes over HTTP.

Instead of the servicer of grpcio-health-checking, whose `set` waits for every watcher to take the
change before: one that reads nothing would hold up all others, and the end of the server with them.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.security.handlers import Context

OVERALL = ""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class ServiceHealth(health_pb2_grpc.HealthServicer):
    """The state of each service; none serves until it is said to, or after `drain`."""

    def __init__(self, services: Iterable[str]) -> None:
        self._serving = dict.fromkeys((OVERALL, *services), False)
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: set[asyncio.Event] = set()

    def start(self) -> None:
        """Know the loop that the watchers run on; before any other thread tells of a change."""
        self._loop = asyncio.get_running_loop()

    def set_serving(self, service: str, serving: bool) -> None:
        """Tell of a change, from any thread, in order. Unknown services are a mistake of ours."""
        assert service in self._serving, service
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._set, service, serving)

    def drain(self) -> None:
        """Nothing serves from now on, whatever is told later. For the loop's thread."""
        for service in self._serving:
            self._set(service, False)
        self._draining = True

    @property
    def serving(self) -> dict[str, bool]:
        """Whether each service serves; "" is the server as a whole."""
        return dict(self._serving)

    async def Check(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    # The stub's type knows only the iterator style; grpc.aio also takes a coroutine that writes.
    async def Watch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> None:
        changed = asyncio.Event()
        self._changed.add(changed)
        told = None
        try:
            while True:
                changed.clear()
                status = self._status(request.service)
                if status != told:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                else:
                    await changed.wait()
        finally:
            self._changed.discard(changed)

    def _status(self, service: str) -> Any:  # the enum of the proto is no type at run time
        if service not in self._serving:
            return _UNKNOWN
        return _SERVING if self._serving[service] else _NOT_SERVING

    def _set(self, service: str, serving: bool) -> None:
        if self._draining:
            return
        self._serving[service] = serving
        for changed in self._changed:
            changed.set()
