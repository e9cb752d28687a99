"""The services over a real gRPC server and channel: what is refused, and what is told of them."""

import asyncio
import io
import logging
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from PIL import Image

import engine.errors
from engine.batching.batcher import BatcherConfig
from engine.batching.step_costs import CostTable
from engine.errors import EngineError
from engine.planner import Planner
from engine.serving.status import STATUS, status_of
from protos.oneword.v1 import server_info_pb2
from protos.oneword.v1.generation_pb2 import GenerateRequest
from tests import service_harness
from tests.fakes import DIM, WAIT_S
from tests.service_harness import (
    SMALL_LIMITS,
    Harness,
    StartServer,
    details,
    field_of,
    fingerprint_of,
    kinds,
)

# Fixtures.
start_server, served = service_harness.start_server, service_harness.served


# Refusals


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "x" * (1 << 20)}, "prompt"),
        ({"prompt": "<a>" * 10_000}, "prompt"),
        ({"negative_prompt": "<a>" * 10_000}, "negative_prompt"),
        ({"prompt": "(cat:nan)"}, "prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10**9}, "num_inference_steps"),
        ({"width": 0}, "width"),
        ({"width": 7}, "width"),
        ({"width": 68}, "width"),
        ({"width": 10**6}, "width"),
        ({"height": 2**32 - 1}, "height"),
        ({"width": 2048, "height": 2048}, "width"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 2**32 - 1}, "num_images"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": 1e30}, "guidance_scale"),
        ({"sampler": "euler_z"}, "sampler"),
        ({"sampler": "x" * 100_000}, "sampler"),
        ({"sampler": "\x1b[31m\n"}, "sampler"),
        ({"strength": 0.5}, "strength"),
        ({"init_image": b"GIF89a", "strength": 0.5}, "init_image"),
        ({"preview_every_steps": 10**6}, "preview_every_steps"),
        ({"image_format": 99}, "image_format"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_the_caller_can_mend_names_the_field(
    served: Harness, fields: dict[str, Any], field: str
) -> None:
    error = await served.refusal(**fields)
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field
    assert details(error)["google.rpc.ErrorInfo"].domain == "oneword"
    assert served.denoiser.num_calls == 0


async def test_a_prompt_too_long_is_refused_before_it_is_searched(served: Harness) -> None:
    """15 MB of different placeholders are 1.5 million look-ups, if anyone looks."""
    prompt = "".join(f"<a{index}>" for index in range(1_500_000))
    error = await served.refusal(prompt=prompt)
    assert details(error)["google.rpc.ErrorInfo"].reason == "PROMPT_TOO_LONG"


@pytest.mark.parametrize("sampler", ["x" * 5000, "\U0001f600" * 5000], ids=["x", "emoji"])
async def test_a_long_value_leaves_room_for_what_is_known(served: Harness, sampler: str) -> None:
    error = await served.refusal(sampler=sampler)
    assert "known: ddim, euler" in (error.details() or "")


async def test_a_strength_that_is_no_share_is_refused(served: Harness) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    for strength in (0.0, -1.0, 1.5, float("nan")):
        error = await served.refusal(init_image=buffer.getvalue(), strength=strength)
        assert error.code() == StatusCode.INVALID_ARGUMENT


async def test_a_message_beyond_the_limit_is_refused(start_server: StartServer) -> None:
    served = await start_server(max_message_bytes=1 << 20)
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        call = served.generation.Generate(
            GenerateRequest(init_image=bytes(8 << 20)), compression=compression, timeout=WAIT_S
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
    assert await served.generate(prompt="a cat")


async def test_a_full_queue_says_when_to_come_back(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await start_server(
        batcher=BatcherConfig(max_images_in_flight=1, max_queued_images=1, max_batch_rows=2)
    )
    served.denoiser.gate.clear()
    first = asyncio.create_task(served.generate(prompt="a cat"))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    second = asyncio.create_task(served.generate(prompt="a dog"))
    while served.server.batcher.load != (1, 1):
        await asyncio.sleep(0.005)
    with monkeypatch.context() as patch:  # no work goes into what is refused
        patch.delattr(Planner, "plan")
        error = await served.refusal(prompt="a red dog")
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    delay = details(error)["google.rpc.RetryInfo"].retry_delay
    assert 0 < delay.ToTimedelta().total_seconds() < 60
    served.denoiser.gate.set()
    assert kinds(await first)[-1] == kinds(await second)[-1] == "summary"


async def test_a_deadline_that_cannot_be_met_is_refused_before_any_work(
    served: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An initial image counts with the part of the schedule that it runs, and is not read."""
    size = {"width": 64, "height": 64}
    area = 64 * 64
    steps = {(area, count): 1000.0 for count in (1, 2, 4)}  # a second each
    costs = CostTable.of(steps, {(area, 1): 1.0}, learns=False)
    monkeypatch.setattr(served.server.batcher._loop, "costs", costs)
    hopeless: list[dict[str, Any]] = [
        {"num_inference_steps": 20},
        {"num_inference_steps": 20, "init_image": b"not read", "strength": 0.5, **size},
    ]
    with monkeypatch.context() as patch:
        patch.delattr(Planner, "plan")
        for fields in hopeless:
            error = await served.refusal(prompt="a cat", timeout=6.0, **fields)
            assert error.code() == StatusCode.DEADLINE_EXCEEDED
            assert "the deadline cannot be met" in (error.details() or "")
    possible: list[dict[str, Any]] = [{"strength": 0.1, **size}, {}]  # 2 s; of no size known yet
    for fields in possible:
        fields = {"num_inference_steps": 20, "init_image": b"no image", **fields}
        error = await served.refusal(prompt="a cat", timeout=6.0, **fields)
        assert error.code() == StatusCode.INVALID_ARGUMENT, "read, and found to be none"


async def test_a_deadline_of_a_millisecond_is_exceeded_and_leaves_nothing(served: Harness) -> None:
    error = await served.refusal(prompt="a cat", num_inference_steps=100, timeout=0.001)
    assert error.code() == StatusCode.DEADLINE_EXCEEDED
    assert await served.is_idle()


async def test_the_deadline_of_the_call_is_that_of_the_job(served: Harness) -> None:
    served.denoiser.gate.clear()
    call = asyncio.create_task(served.refusal(prompt="a cat", timeout=0.2))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    (slot,) = served.server.batcher._slots
    assert slot.job.deadline is not None
    assert 0.0 < slot.job.deadline - slot.job.submitted <= 0.2
    assert (await call).code() == StatusCode.DEADLINE_EXCEEDED
    served.denoiser.gate.set()
    assert await served.is_idle()
    assert served.denoiser.num_calls == 1


async def test_what_breaks_inside_stays_inside(
    served: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    served.denoiser.error = RuntimeError("secret at /srv/models")
    with caplog.at_level(logging.ERROR):
        error = await served.refusal(prompt="a red cat")
    assert error.code() == StatusCode.INTERNAL
    request_id = details(error)["google.rpc.RequestInfo"].request_id
    assert "secret" not in f"{error.details()} {error.trailing_metadata()}"
    assert request_id in (error.details() or "") and request_id in caplog.text
    assert "red cat" not in caplog.text
    served.denoiser.error = None
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"


async def test_prompts_are_not_logged(served: Harness, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await served.generate(prompt="a red dog")
        await served.refusal(prompt="a red <dog>")
    assert "red" not in caplog.text


def test_every_error_of_the_runtime_has_a_status() -> None:
    found: set[type[EngineError]] = {EngineError}
    waiting = [EngineError]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        waiting += subclasses
        found |= {c for c in subclasses if c.__module__ == engine.errors.__name__}
    assert found == set(STATUS)


def test_long_texts_of_callers_fit_into_trailers() -> None:
    error = engine.errors.InvalidRequest("\U0001f600" * 100_000, field="prompt")
    status = status_of(error, "0" * 32)
    (details_bin,) = [value for _, value in status.trailing_metadata or ()]
    # grpc-message is percent-encoded: three characters a byte. Peers refuse beyond 8 KiB.
    assert 3 * len((status.details or "").encode()) + len(details_bin) * 4 / 3 < 8 << 10


RETRY_INFO = b"google.rpc.RetryInfo"


def _bytes_of(status: grpc.Status) -> bytes:
    found = dict(status.trailing_metadata or ())["grpc-status-details-bin"]
    assert isinstance(found, bytes)
    return found


def test_who_killed_the_model_is_told_not_to_come_back_and_who_met_a_failing_disk_when_to() -> None:
    deadly = status_of(engine.errors.WorkerDied("it ended by SIGKILL"), "r")
    assert ("grpc-retry-pushback-ms", "-1") in (deadly.trailing_metadata or ())  # gRPC: never again
    failing = status_of(engine.errors.StoreError("input/output error"), "r")
    assert RETRY_INFO in _bytes_of(failing)
    full = status_of(engine.errors.StorageFull("no space left"), "r")
    assert RETRY_INFO not in _bytes_of(full)


# Server information


async def test_the_server_describes_model_limits_and_load(served: Harness) -> None:
    served.denoiser.gate.clear()
    running = asyncio.create_task(served.generate(prompt="a cat"))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    info = await served.info.GetServerInfo(server_info_pb2.GetServerInfoRequest())
    served.denoiser.gate.set()
    await running
    assert (info.model.name, info.model.precision, info.model.default_size) == ("fake", "fp32", 64)
    assert list(info.model.samplers) == ["ddim", "euler"]
    assert info.model.embedding_dim == DIM
    assert info.model.embedding_fingerprint == fingerprint_of(served)
    assert info.limits.max_concepts_per_request == SMALL_LIMITS.max_concepts_per_request
    assert info.limits.max_queued_images == BatcherConfig().max_queued_images
    assert (info.load.images_in_flight, info.load.images_queued) == (1, 0)
    assert set(info.versions) == {"onnx", "oneword"}
