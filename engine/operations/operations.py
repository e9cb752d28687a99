"""How the server is watched, put together: health, counts, traces, the HTTP port.

`engine.serving.server` makes one of these, hands its interceptors to gRPC and its observation to
every batcher, and tells it when the server starts, drains and ends.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc.aio

from engine.operations.call_interceptor import CallInterceptor, methods_of
from engine.operations.config import OperationsConfig, is_loopback, split_address
from engine.operations.memory import children_resident_bytes, resident_bytes
from engine.operations.metrics import Gauge, Labels, Metrics
from engine.operations.observed_batcher import Observation
from engine.operations.probes import Probes
from engine.operations.prometheus_text import make_exposition
from engine.operations.service_health import ServiceHealth
from engine.operations.tracing import TracingInterceptor, make_provider

HEALTH_SERVICE = "grpc.health.v1.Health"
REFLECTION_SERVICE = "grpc.reflection.v1alpha.ServerReflection"

logger = logging.getLogger(__name__)


def check_available(config: OperationsConfig) -> None:
    """Raise `ConfigError` for what needs a package that is missing: before a model is loaded."""
    if config.metrics_listen is not None:
        make_exposition(Metrics())
    if config.trace_exporter is not None:
        make_provider(config.trace_exporter, config.trace_sample_ratio).shutdown()


class Operations:
    """What operators and their programs see of a server."""

    def __init__(
        self,
        config: OperationsConfig,
        services: Iterable[str],
        *,
        load: Callable[[], tuple[int, int]],
    ) -> None:
        """`load` tells (images in flight, images queued). Raises `ConfigError`."""
        services = tuple(services)
        methods = methods_of((*services, HEALTH_SERVICE, REFLECTION_SERVICE))
        self.health = ServiceHealth(services)
        self.metrics = Metrics(max_tenants=config.metrics_tenants)
        self.observation = Observation(self.metrics)
        self._calls = CallInterceptor(self.metrics, methods, access_log=config.access_log)
        self.probes_address = ""
        self._probes: Probes | None = None
        self._provider: Any = None
        self._tracing: TracingInterceptor | None = None
        if config.metrics_listen is not None:
            self._probes = Probes(
                config.metrics_listen,
                serving=lambda: self.health.serving,
                metrics=make_exposition(self.metrics),
            )
            self._warn_of_strangers(config.metrics_listen)
        if config.trace_exporter is not None:
            self._trace(make_provider(config.trace_exporter, config.trace_sample_ratio), methods)
        self._add_gauges(load)

    def interceptors(self, *gates: grpc.aio.ServerInterceptor) -> list[grpc.aio.ServerInterceptor]:
        """For the server, outermost first: whom a gate refuses is logged, and leaves no trace."""
        return [self._calls, *gates, *([self._tracing] if self._tracing else [])]

    @property
    def calls_in_flight(self) -> int:
        """Calls under way, of any method."""
        return self._calls.in_flight

    def add_gauge(
        self,
        name: str,
        summary: str,
        read: Callable[[], Mapping[Labels, float]],
        labels: Labels = (),
    ) -> None:
        """Have the metrics look a value up whenever they are read, from any thread."""
        self.metrics.gauges.append(Gauge(name=name, summary=summary, labels=labels, read=read))

    async def start(self) -> None:
        """Listen for probes; before the services serve."""
        self.health.start()
        if self._probes is not None:
            self.probes_address = await self._probes.start()
            logger.info("metrics and probes on http://%s", self.probes_address)

    def drain(self) -> None:
        """Say that nothing serves any more, and refuse new calls."""
        self.health.drain()
        self._calls.drain()

    async def stop(self) -> None:
        """The very last: probes see the server drain."""
        if self._probes is not None:
            await self._probes.stop()
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)  # sends what is left

    def _trace(self, provider: Any, methods: Iterable[str]) -> None:
        self._provider = provider
        self._tracing = TracingInterceptor(provider, methods)
        self.observation.trace = self._tracing.watch_request

    def _add_gauges(self, load: Callable[[], tuple[int, int]]) -> None:
        running = self.observation.running
        self.add_gauge(
            "oneword_images_in_flight",
            "Images between their first and last step.",
            lambda: {(): load()[0]},
        )
        self.add_gauge(
            "oneword_images_queued", "Images waiting for a slot.", lambda: {(): load()[1]}
        )
        self.add_gauge(
            "oneword_backlog_row_steps",
            "Work not yet done: denoiser rows times steps of all requests in the batcher.",
            lambda: {(): sum(watched.row_steps_left for watched in running())},
        )
        self.add_gauge(
            "oneword_rpcs_in_flight", "Calls under way.", lambda: {(): self._calls.in_flight}
        )
        self.add_gauge(
            "oneword_serving",
            "Whether a service serves; the empty one is the server as a whole.",
            lambda: {(name,): float(serves) for name, serves in self.health.serving.items()},
            ("service",),
        )
        self.add_gauge(
            "oneword_resident_memory_bytes",
            "Memory of the server's process, and of those below it.",
            lambda: {("server",): resident_bytes(), ("children",): children_resident_bytes()},
            ("process",),
        )

    def _warn_of_strangers(self, listen: str) -> None:
        host, _ = split_address(listen)
        if not is_loopback(host):
            logger.warning(
                "metrics_listen: whoever reaches %s can read the metrics; they name no prompt and "
                "no concept",
                listen,
            )
