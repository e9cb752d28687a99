"""Spans under the caller's, and nothing in them that the caller wrote."""

import sys
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.errors import ConfigError
from engine.operations import operations
from engine.operations.config import OperationsConfig
from engine.operations.tracing import make_provider, trace_metadata
from protos.oneword.v1 import server_info_pb2
from protos.oneword.v1.generation_pb2 import GenerateRequest
from tests import service_harness
from tests.fakes import WAIT_S
from tests.operations_setup import ended
from tests.service_harness import Harness, StartServer, first_response

start_server = service_harness.start_server

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
HEADER = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")
GENERATE = "oneword.v1.ImageGenerationService/Generate"
SECRET = "marmalade"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Where the spans of servers in this test end up; all else of the tracing is the real one."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(operations, "make_provider", lambda *_settings: provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
async def traced(start_server: StartServer, exporter: InMemorySpanExporter) -> Harness:
    assert exporter.get_finished_spans() == ()
    return await start_server(operations=OperationsConfig(trace_exporter="memory"))


async def generate(served: Harness, *metadata: tuple[str, str], **fields: Any) -> None:
    request = GenerateRequest(num_inference_steps=4, **fields)
    async for _ in served.generation.Generate(request, timeout=WAIT_S, metadata=metadata):
        pass


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.trace_id


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


async def test_a_call_is_a_child_of_the_callers_span(
    traced: Harness, exporter: InMemorySpanExporter
) -> None:
    await generate(traced, HEADER, ("x-request-id", "mine"), prompt=f"a {SECRET} cat")
    await ended(traced)
    found = spans(exporter)
    root = found[GENERATE]
    assert f"{trace_of(root):032x}" == TRACE_ID
    assert f"{parent_of(root):016x}" == PARENT_ID
    assert root.kind is trace.SpanKind.SERVER
    assert root.attributes is not None
    assert root.attributes["oneword.request_id"] == "mine"
    assert root.attributes["rpc.grpc.status_code"] == 0
    assert root.attributes["network.peer.address"] == "127.0.0.1"
    assert root.status.is_unset
    assert {trace_of(span) for span in found.values()} == {trace_of(root)}
    assert SECRET not in "".join(span.to_json() for span in found.values())


async def test_the_stages_of_a_request_follow_each_other(
    traced: Harness, exporter: InMemorySpanExporter
) -> None:
    await generate(traced, prompt="a cat", num_images=2, guidance_scale=2.0)
    await ended(traced)
    found = spans(exporter)
    request = found["request"]
    assert parent_of(request) == id_of(found[GENERATE])
    assert (
        dict(request.attributes or {}).items()
        >= {
            "oneword.images": 2,
            "oneword.rows": 2,
            "oneword.steps": 4,
        }.items()
    )
    stages = [found[name] for name in ("queue", "encode", "denoise", "decode")]
    for stage in stages:
        assert parent_of(stage) == id_of(request)
        assert stage.start_time is not None and stage.end_time is not None
        assert stage.start_time <= stage.end_time
    for before, after in zip(stages, stages[1:], strict=False):
        assert before.end_time == after.start_time
    assert found["denoise"].end_time != found["denoise"].start_time


async def test_a_refused_call_is_an_error_with_its_reason_and_not_its_text(
    traced: Harness, exporter: InMemorySpanExporter
) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(traced, prompt=f"a <{SECRET}>")
    await ended(traced)
    span = spans(exporter)[GENERATE]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == "NOT_FOUND"
    assert (span.attributes or {})["oneword.reason"] == "UNKNOWN_CONCEPT"
    assert not span.events
    assert SECRET not in span.to_json()


async def test_a_failed_request_is_an_error_too(
    traced: Harness, exporter: InMemorySpanExporter
) -> None:
    traced.denoiser.error = RuntimeError(SECRET)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(traced, prompt="a cat")
    assert caught.value.code() == StatusCode.INTERNAL
    await ended(traced)
    found = spans(exporter)
    assert found["request"].status.status_code is trace.StatusCode.ERROR
    assert "queue" not in found
    assert SECRET not in "".join(span.to_json() for span in found.values())


async def test_the_span_of_a_cancelled_call_ends(
    traced: Harness, exporter: InMemorySpanExporter
) -> None:
    traced.denoiser.gate.clear()
    call = traced.generation.Generate(GenerateRequest(prompt="a"), timeout=WAIT_S)
    await first_response(call)
    call.cancel()
    await ended(traced)
    span = spans(exporter)[GENERATE]
    assert span.status.description == "CANCELLED"
    assert (span.attributes or {})["rpc.grpc.status_code"] == 1


async def test_a_caller_without_a_trace_begins_one(
    traced: Harness, exporter: InMemorySpanExporter
) -> None:
    for header in (("traceparent", "rubbish"), ("traceparent", "00-0-0-01"), ("other", "x")):
        await traced.info.GetServerInfo(
            server_info_pb2.GetServerInfoRequest(), metadata=(header,), timeout=WAIT_S
        )
    await ended(traced)
    found = exporter.get_finished_spans()
    assert len(found) == 3 and all(span.parent is None for span in found)
    assert len({trace_of(span) for span in found}) == 3


async def test_a_client_sends_its_span_along(
    traced: Harness, exporter: InMemorySpanExporter
) -> None:
    assert trace_metadata() == ()
    tracer = TracerProvider().get_tracer("client")
    with tracer.start_as_current_span("mine") as span:
        await generate(traced, *trace_metadata(), prompt="a cat")
    await ended(traced)
    assert parent_of(spans(exporter)[GENERATE]) == span.get_span_context().span_id


def test_exporters_are_found_by_name() -> None:
    provider: Any = make_provider("console", 0.5)
    assert "TraceIdRatioBased{0.5}" in provider.sampler.get_description()
    provider.shutdown()
    with pytest.raises(ConfigError, match="no trace exporter 'smoke-signals', only .*console"):
        make_provider("smoke-signals", 1.0)


def test_traces_without_the_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'oneword\[tracing\]'"):
        make_provider("console", 1.0)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace.propagation.tracecontext", None)
    assert trace_metadata() == ()
