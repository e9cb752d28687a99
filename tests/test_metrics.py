"""What is counted under real calls, and how Prometheus and probes read it."""

import asyncio
import sys
from typing import Any

import grpc.aio
import numpy as np
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from engine.batching.batcher import BatcherConfig, Failed, ImageDone
from engine.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    NumericalError,
    ShuttingDown,
)
from engine.operations.config import OperationsConfig, split_address
from engine.operations.metrics import Histogram, Metrics
from engine.operations.observed_batcher import Observation
from engine.operations.prometheus_text import make_exposition
from engine.operations.service_health import ServiceHealth
from protos.oneword.v1 import server_info_pb2
from protos.oneword.v1.generation_pb2 import GenerateRequest
from tests import service_harness
from tests.fakes import WAIT_S
from tests.operations_setup import ended
from tests.service_harness import Harness, StartServer, details, first_response

start_server, served = service_harness.start_server, service_harness.served

GENERATE = "/oneword.v1.ImageGenerationService/Generate"
GENERATION = "oneword.v1.ImageGenerationService"
HTTP = OperationsConfig(metrics_listen="0")


async def fetch(served: Harness, path: str, method: str = "GET") -> tuple[int, str]:
    """The status and the body of a page of the HTTP port."""
    host, _, port = served.server.operations.probes_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition("\r\n\r\n")
    assert f"Content-Length: {len(body.encode())}\r\n" in head
    return int(head.split()[1]), body


async def scrape(served: Harness) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, as Prometheus' own parser reads it.

    The labels are in the order of their names: that is how they are written.
    """
    status, text = await fetch(served, "/metrics")
    assert status == 200
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_what_was_done_is_what_is_read(start_server: StartServer) -> None:
    served = await start_server(operations=HTTP)
    await served.generate(prompt="a cat", num_images=3, guidance_scale=2.0)
    await served.generate(prompt="a dog", guidance_scale=1.0)
    await served.refusal(prompt="a <ghost>")
    await ended(served)
    found = await scrape(served)
    assert found["oneword_images_total",] == 4.0
    assert found["oneword_requests_total", "finished"] == 2.0
    assert found["oneword_rpcs_total", "OK", GENERATE] == 2.0
    assert found["oneword_rpcs_total", "NOT_FOUND", GENERATE] == 1.0
    assert found["oneword_rpc_seconds_count", GENERATE] == 3.0
    assert found["oneword_queue_wait_seconds_count",] == 2.0
    # Four images of four steps, two rows each with guidance and one without.
    assert found["oneword_batch_rows_sum",] == 3 * 4 * 2 + 4
    assert found["oneword_step_seconds_count",] == served.denoiser.num_calls
    assert found["oneword_step_seconds_bucket", "+Inf"] == served.denoiser.num_calls
    for stage in ("encode", "denoise", "decode"):
        assert found["oneword_stage_seconds_count", stage] == 2.0
    assert found["oneword_stage_seconds_sum", "denoise"] > 0.0
    assert found["oneword_backlog_row_steps",] == found["oneword_images_queued",] == 0.0
    assert found["oneword_serving", GENERATION] == found["oneword_serving", ""] == 1.0
    assert found["oneword_resident_memory_bytes", "server"] > 1 << 20
    assert not [key for key in found if "tenant" in key[0] or "ghost" in str(key)]


async def test_a_running_request_is_a_backlog(start_server: StartServer) -> None:
    served = await start_server(operations=HTTP)
    served.denoiser.gate.clear()
    served.denoiser.free_calls = 1
    request = GenerateRequest(prompt="a cat", num_inference_steps=5, guidance_scale=2.0)
    call = served.generation.Generate(request, timeout=WAIT_S)
    while not (await call.read()).HasField("progress"):
        pass
    found = await scrape(served)
    assert found["oneword_backlog_row_steps",] == 2 * (5 - 1)
    assert found["oneword_images_in_flight",] == 1.0
    assert found["oneword_rpcs_in_flight",] == 1.0
    info = await served.info.GetServerInfo(server_info_pb2.GetServerInfoRequest())
    (tenant,) = info.load.tenants
    assert (tenant.tenant, tenant.images_left, tenant.backlog_row_steps) == ("default", 1, 8)
    call.cancel()
    await ended(served)
    served.denoiser.gate.set()
    assert await served.is_idle()
    found = await scrape(served)
    assert found["oneword_cancelled_total", "caller"] == 1.0
    assert found["oneword_requests_total", "cancelled"] == 1.0
    assert found["oneword_rpcs_total", "CANCELLED", GENERATE] == 1.0
    assert found["oneword_backlog_row_steps",] == 0.0


async def test_what_is_shed_is_counted_by_reason(start_server: StartServer) -> None:
    config = BatcherConfig(max_images_in_flight=1, max_queued_images=1)
    served = await start_server(operations=HTTP, batcher=config)
    served.denoiser.gate.clear()
    calls = list[Any]()
    for _ in range(2):  # the first leaves the queue, the second fills it
        calls.append(served.generation.Generate(GenerateRequest(prompt="a"), timeout=WAIT_S))
        await first_response(calls[-1])
        await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    error = await served.refusal(prompt="a cat")
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    found = await scrape(served)
    assert found["oneword_shed_total", "queue_full"] == 1.0
    assert found["oneword_images_queued",] == 1.0
    for call in calls:
        call.cancel()


async def test_a_call_whose_time_is_up_is_no_cancelled_one(served: Harness) -> None:
    served.denoiser.gate.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.generate(prompt="a cat", timeout=0.3)
    assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED
    await ended(served)  # by the batcher, or by the caller that hung up: whichever was first
    rpcs = served.server.operations.metrics.rpcs.read()
    assert rpcs == {(GENERATE, "DEADLINE_EXCEEDED"): 1.0}


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (Cancelled("x"), "cancelled", {"caller": 1}),
        (DeadlineExceeded("x"), "deadline", {"deadline": 1}),
        (ShuttingDown("x"), "shutting_down", {"shutting_down": 1}),
        (NumericalError("x"), "numerical_error", {}),
        (RuntimeError("x"), "failed", {}),
    ],
)
async def test_every_end_of_a_request_is_counted_once(
    served: Harness, error: Exception, outcome: str, reason: dict[str, int]
) -> None:
    plan = served.server._runtime.pipeline.plan(service_harness.DEFAULTS)
    observation, told = Observation(), list[object]()
    watched = observation.watch(plan, told.append, "t")
    for _ in range(2):
        watched.tell(Failed(error=error))
    assert observation.abandon(ShuttingDown("x")) == 0
    assert len(told) == 1 and observation.running() == []
    metrics = observation.metrics
    assert metrics.requests.by_label() == {outcome: 1}
    assert metrics.cancelled.by_label() == reason
    assert metrics.deadline_missed.total == float(isinstance(error, DeadlineExceeded))


async def test_what_callers_invent_makes_no_new_rows(start_server: StartServer) -> None:
    served = await start_server(operations=HTTP)
    for number in range(5):
        call: Any = served.channel.unary_unary(f"/oneword.v1.Invented{number}/Method")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=WAIT_S)
        assert caught.value.code() == StatusCode.UNIMPLEMENTED
    await ended(served)
    found = await scrape(served)
    assert found["oneword_rpcs_total", "UNIMPLEMENTED", "unknown"] == 5.0
    assert not [key for key in found if "Invented" in str(key)]


def test_tenants_are_named_up_to_the_cap() -> None:
    metrics = Metrics(max_tenants=2)
    for tenant in ("a", "b", "c", "d", "a"):
        metrics.count_image(tenant)
    assert metrics.tenant_images.by_label() == {"a": 2, "b": 1, "other": 2}
    assert round(metrics.images.total) == 5
    assert b'oneword_tenant_images_total{tenant="other"} 2.0' in make_exposition(metrics)("")[0]


def test_a_restart_is_a_model_that_serves_again() -> None:
    metrics = Metrics()
    for serves in (True, False, False, True, True, False, True):
        metrics.model_serves(serves)
    assert metrics.worker_restarts.total == 2.0


def test_a_bucket_holds_what_is_at_most_its_bound() -> None:
    histogram = Histogram("h", "", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.of().counts == (2, 2, 1)
    assert (histogram.of().count, histogram.of().sum) == (5, 14.0)


async def test_what_is_abandoned_is_told_at_once_and_once(served: Harness) -> None:
    plan = served.server._runtime.pipeline.plan(service_harness.DEFAULTS)
    observation, told = Observation(), list[object]()
    watched = observation.watch(plan, told.append, "t")
    error = ShuttingDown("x")
    assert observation.abandon(error) == 1
    watched.tell(Failed(error=Cancelled("the worker notices later")))
    assert told == [Failed(error=error)]


async def test_images_told_while_submitting_come_from_a_cache(served: Harness) -> None:
    plan = served.server._runtime.pipeline.plan(service_harness.DEFAULTS)
    observation = Observation()
    watched = observation.watch(plan, lambda _event: None, "t")
    image = ImageDone(image_index=0, seed=0, image=np.zeros((8, 8, 3), np.uint8))
    watched.tell(image)
    await asyncio.to_thread(watched.tell, image)
    assert observation.metrics.cache_hits.by_label() == {"result": 1}


# Probes


async def test_probes_follow_the_health_of_the_server(start_server: StartServer) -> None:
    served = await start_server(operations=HTTP)
    assert (await fetch(served, "/healthz"))[0] == 200
    status, body = await fetch(served, "/readyz")
    assert status == 200 and f"{GENERATION}: serving" in body
    served.server.operations.health.set_serving("", False)
    await asyncio.sleep(0)
    assert (await fetch(served, "/readyz"))[0] == 503
    assert (await fetch(served, "/healthz"))[0] == 200
    served.server.operations.health.set_serving("", True)
    served.server.operations.drain()
    status, body = await fetch(served, "/readyz")
    assert status == 503 and f"{GENERATION}: not serving" in body


async def test_the_http_port_answers_nothing_else(start_server: StartServer) -> None:
    served = await start_server(operations=HTTP)
    assert (await fetch(served, "/etc/passwd"))[0] == 404
    assert (await fetch(served, "/../metrics"))[0] == 404
    assert (await fetch(served, "/metrics", "POST"))[0] == 405
    host, _, port = served.server.operations.probes_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /" + b"x" * 100_000)
    assert await reader.read() == b""  # too long to be a probe
    writer.close()
    assert (await fetch(served, "/healthz"))[0] == 200


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:9464", ("::1", 9464)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_a_port_alone_is_one_of_this_machine(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize("address", ["", ":9464", "::1:9464", "host", "host:", "1:99999", "-1"])
def test_what_is_no_http_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="metrics_listen must be a port"):
        OperationsConfig(metrics_listen=address)


async def test_an_http_port_in_use_is_a_clear_error(start_server: StartServer) -> None:
    served = await start_server(operations=HTTP)
    taken = served.server.operations.probes_address
    with pytest.raises(ConfigError, match=f"cannot listen on {taken} for metrics_listen"):
        await start_server(operations=OperationsConfig(metrics_listen=taken))


def test_metrics_without_the_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'oneword\[metrics\]'"):
        make_exposition(Metrics())


# Health with Watch


async def test_watch_tells_each_change_of_a_service(served: Harness) -> None:
    stub: Any = health_pb2_grpc.HealthStub(served.channel)  # pyright: ignore[reportArgumentType]
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=GENERATION), timeout=WAIT_S)
    other = stub.Watch(health_pb2.HealthCheckRequest(service="other"), timeout=WAIT_S)
    health, states = served.server.operations.health, health_pb2.HealthCheckResponse
    assert (await watch.read()).status == states.SERVING
    assert (await other.read()).status == states.SERVICE_UNKNOWN
    # From a thread, as the supervisor of a worker tells it.
    await asyncio.to_thread(health.set_serving, GENERATION, False)
    assert (await watch.read()).status == states.NOT_SERVING
    await asyncio.to_thread(health.set_serving, GENERATION, True)
    assert (await watch.read()).status == states.SERVING
    health.drain()
    assert (await watch.read()).status == states.NOT_SERVING
    health.set_serving(GENERATION, True)  # too late
    response = await stub.Check(health_pb2.HealthCheckRequest(service=GENERATION))
    assert response.status == states.NOT_SERVING
    watch.cancel()
    other.cancel()


async def test_a_watcher_that_reads_nothing_holds_nobody_up() -> None:
    class Stalled:
        async def write(self, _response: object) -> None:
            await asyncio.Event().wait()

    health = ServiceHealth(["s"])
    health.start()
    stalled = asyncio.create_task(health.Watch(health_pb2.HealthCheckRequest(), Stalled()))
    await asyncio.sleep(0)
    health.set_serving("", True)
    await asyncio.sleep(0)
    assert health.serving[""]
    health.drain()
    assert not health.serving[""]
    stalled.cancel()


async def test_a_draining_server_says_when_to_come_back(served: Harness) -> None:
    served.server.operations.drain()
    error = await served.refusal(prompt="a cat")
    assert error.code() == StatusCode.UNAVAILABLE
    assert details(error)["google.rpc.RetryInfo"].retry_delay.seconds == 1
    info = await served.info.GetServerInfo(server_info_pb2.GetServerInfoRequest())
    assert not info.serving[""] and info.load.totals.shed["shutting_down"] == 1
