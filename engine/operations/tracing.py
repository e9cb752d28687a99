"""OpenTelemetry: a span for each call, under the caller's, with the stages of a request below it.

The interceptor is ours, since it must end the span of a cancelled stream and must not swallow the
cancellation. Spans carry ids, methods, counts and codes; nothing that a caller wrote.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from engine.batching.batcher import Event, Failed, Finished
from engine.errors import ConfigError
from engine.operations.call_interceptor import end_of
from engine.operations.calls import current_call, host_of
from engine.operations.observed_batcher import Watched
from engine.security.callers import current_caller
from engine.security.handlers import Context, Handler, wrapped

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer
else:
    Span = Tracer = TracerProvider = Any

_PROPAGATED = ("traceparent", "tracestate")
_EXPORTERS = "opentelemetry_traces_exporter"  # the entry points of OpenTelemetry's packages
_SHORT_NAMES = {"otlp": "otlp_proto_grpc"}


def make_provider(exporter: str, sample_ratio: float) -> TracerProvider:
    """Spans on their way to an exporter, in batches, from a thread; raises `ConfigError`."""
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ModuleNotFoundError as error:
        raise ConfigError(
            "trace_exporter needs OpenTelemetry; install it with: pip install 'oneword[tracing]'"
        ) from error
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(sample_ratio),
        resource=Resource.create({"service.name": "oneword"}),
    )
    provider.add_span_processor(BatchSpanProcessor(_exporter(exporter)))
    return provider


def _exporter(name: str) -> Any:
    name = _SHORT_NAMES.get(name, name)
    found = {entry.name: entry for entry in entry_points(group=_EXPORTERS)}
    if name not in found:
        raise ConfigError(
            f"there is no trace exporter {name!r}, only {', '.join(sorted(found)) or 'none'}; "
            "for otlp: pip install opentelemetry-exporter-otlp-proto-grpc"
        )
    return found[name].load()()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """The current span as headers of a call: what a client sends so that the server's span is its
    child. Nothing where there is no span, or no OpenTelemetry.

        stub.Generate(request, metadata=trace_metadata())
    """
    try:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ModuleNotFoundError:
        return ()
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())


class TracingInterceptor(grpc.aio.ServerInterceptor):
    """A span around each call, with the W3C context of the caller as its parent."""

    def __init__(self, provider: TracerProvider, methods: Iterable[str]) -> None:
        self._tracer: Tracer = provider.get_tracer("oneword")
        self._methods = frozenset(methods)

    # The stub says that there is always a handler; there is none for an unknown method.
    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        details: Any = handler_call_details
        handler = await continuation(handler_call_details)
        path: str = details.method
        if handler is None or path not in self._methods or path.startswith("/grpc."):
            return handler
        return wrapped(handler, lambda context: self._around(context, path))

    @asynccontextmanager
    async def _around(self, context: Context, path: str) -> AsyncGenerator[None]:
        from opentelemetry import trace

        # A span that has ended can no longer be written to: who ends it is here alone.
        span = self._tracer.start_span(
            path.strip("/"),
            context=_parent(context.invocation_metadata() or ()),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(context, path),
        )
        allowed_s = context.time_remaining()
        cancelled = True
        try:
            with trace.use_span(
                span, end_on_exit=False, record_exception=False, set_status_on_exception=False
            ):
                try:
                    yield
                except Exception:  # a status of the call: not its text, which a caller may have
                    cancelled = False
                    raise
            cancelled = False
        finally:
            _end(span, context, cancelled, allowed_s)

    def watch_request(self) -> Callable[[Watched, Event], None] | None:
        """What tells the span of the current call how a request in it went."""
        from opentelemetry import trace

        span = trace.get_current_span()
        if not span.is_recording():
            return None
        parent = trace.set_span_in_context(span)

        def tell(watched: Watched, event: Event) -> None:
            if isinstance(event, Finished | Failed):
                self._add_stages(watched, event, parent)

        return tell

    def _add_stages(self, watched: Watched, event: Finished | Failed, parent: Any) -> None:
        """Spans of what is over: queue, encode, denoise and decode, one after the other.

        Images of a request may decode while others step; what is shown is how long each took.
        """
        attributes = {
            "oneword.images": watched.plan.request.num_images,
            "oneword.rows": len(watched.plan.weights),
            "oneword.steps": len(watched.plan.trajectory.rows),
        }
        request = self._tracer.start_span(
            "request", context=parent, start_time=watched.submitted_ns, attributes=attributes
        )
        from opentelemetry import trace

        if isinstance(event, Failed):
            request.set_status(trace.StatusCode.ERROR, type(event.error).__name__)
            request.end()
            return
        timings = event.timings
        request.set_attribute("oneword.denoiser_calls", timings.denoiser_calls)
        request.set_attribute("oneword.mean_batch_rows", timings.mean_batch_rows)
        below = trace.set_span_in_context(request)
        at_ns = watched.submitted_ns
        encode_ms = 1e3 * watched.encode_s
        for name, duration_ms in (
            ("queue", timings.queue_wait_ms),
            ("encode", encode_ms),
            ("denoise", max(timings.denoise_ms - encode_ms, 0.0)),
            ("decode", timings.decode_ms),
        ):
            span = self._tracer.start_span(name, context=below, start_time=at_ns)
            at_ns += round(1e6 * duration_ms)
            span.end(at_ns)
        request.end(max(at_ns, watched.submitted_ns + round(1e6 * timings.total_ms)))


def _parent(metadata: Iterable[tuple[str, str | bytes]]) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {
        key: value for key, value in metadata if key in _PROPAGATED and isinstance(value, str)
    }
    return TraceContextTextMapPropagator().extract(carrier)


def _attributes(context: Context, path: str) -> dict[str, str]:
    service, _, method = path.strip("/").partition("/")
    call = current_call()
    return {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "network.peer.address": host_of(context.peer()),
        "oneword.request_id": call.request_id if call else "",
    }


def _end(span: Span, context: Context, cancelled: bool, allowed_s: float | None) -> None:
    from opentelemetry import trace

    code, reason = end_of(context, cancelled, allowed_s)
    number = grpc.StatusCode[code].value[0]
    span.set_attribute("rpc.grpc.status_code", number)
    span.set_attribute("oneword.tenant", current_caller().tenant)
    if reason:
        span.set_attribute("oneword.reason", reason)
    if number:
        span.set_status(trace.StatusCode.ERROR, code)
    span.end()
