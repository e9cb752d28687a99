"""Streams over a real gRPC server and channel: what comes, and what happens to who leaves."""

import asyncio
import gc
import io
import logging
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc import StatusCode
from PIL import Image

from engine.batching.batcher import BatcherConfig, Failed, ImageDone, StepDone
from engine.images import read_parameters
from engine.requests import Limits
from engine.serving.streams import MAX_WAITING_STEPS, EventStream
from protos.oneword.v1 import generation_pb2
from protos.oneword.v1.generation_pb2 import GenerateRequest
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub
from tests import service_harness
from tests.fakes import WAIT_S
from tests.operations_setup import ended
from tests.service_harness import (
    DEFAULTS,
    Harness,
    StartServer,
    first_response,
    images,
    kinds,
    make_concept,
    pixels,
)
from tests.soak.http2 import DATA, END_STREAM, connected, frame, opened, settings
from tests.soak.http2 import message as framed

# Fixtures.
start_server, served = service_harness.start_server, service_harness.served


class LoopThatCounts(asyncio.AbstractEventLoop):
    """The one method of an event loop that a stream calls, at once, counting."""

    def __init__(self) -> None:
        self.calls = 0

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        self.calls += 1
        callback(*args)


# Streams


async def test_events_come_in_order_and_the_summary_is_last(served: Harness) -> None:
    responses = await served.generate(prompt="a photo of cat", num_images=2, seed=7)
    order = kinds(responses)
    assert order[0] == "accepted" and order[-1] == "summary"
    assert order.count("progress") == 8 and order.count("image") == 2
    for index in range(2):
        own = [r for r in responses if r.HasField("progress") and r.progress.image_index == index]
        assert [(r.progress.step, r.progress.num_steps) for r in own] == [
            (step, 4) for step in range(1, 5)
        ]
        image = next(r for r in responses if r.HasField("image") and r.image.image_index == index)
        assert responses.index(image) > responses.index(own[-1])
        assert (image.image.seed, image.image.format) == (
            7 + index,
            generation_pb2.IMAGE_FORMAT_PNG,
        )
        assert pixels(image.image.image).shape == (64, 64, 3)


async def test_what_is_absent_takes_the_runtimes_default_and_is_reported(served: Harness) -> None:
    call = served.generation.Generate(GenerateRequest(prompt="a cat"), timeout=WAIT_S)
    responses = [response async for response in call]
    accepted, summary = responses[0].accepted, responses[-1].summary
    for message in (accepted, summary):
        assert message.sampler == DEFAULTS.sampler
        assert message.num_inference_steps == DEFAULTS.num_inference_steps
        assert message.guidance_scale == DEFAULTS.guidance_scale
        assert (message.width, message.height) == (64, 64)
    assert list(summary.seeds) == [accepted.seed]
    assert summary.model_name == "fake"
    assert (summary.num_tokens, summary.num_chunks, summary.cut_prompt) == (2, 1, "")


async def test_the_random_seed_is_reported_and_makes_the_same_image_again(served: Harness) -> None:
    first = await served.generate(prompt="a cat")
    second = await served.generate(prompt="a cat")
    again = await served.generate(prompt="a cat", seed=first[0].accepted.seed)
    assert first[0].accepted.seed != second[0].accepted.seed
    assert images(first)[0].image == images(again)[0].image
    assert images(first)[0].image != images(second)[0].image


async def test_seed_zero_and_the_largest_seed_are_seeds(served: Harness) -> None:
    assert (await served.generate(seed=0))[0].accepted.seed == 0
    responses = await served.generate(seed=2**64 - 1, num_images=2)
    assert list(responses[-1].summary.seeds) == [2**64 - 1, 0]
    assert [image.seed for image in images(responses)] == [2**64 - 1, 0]


async def test_previews_come_as_asked(served: Harness) -> None:
    responses = await served.generate(num_inference_steps=6, preview_every_steps=2)
    progress = [r.progress for r in responses if r.HasField("progress")]
    previews = {p.step: p.preview for p in progress if p.HasField("preview")}
    assert sorted(previews) == [2, 4]  # not the last step, whose image follows
    assert pixels(previews[2]).shape == (8, 8, 3)  # one pixel for each latent


async def test_a_file_says_how_it_was_made(served: Harness) -> None:
    served.store.import_concept(make_concept())
    for image_format, name in (
        (generation_pb2.IMAGE_FORMAT_PNG, "PNG"),
        (generation_pb2.IMAGE_FORMAT_WEBP, "WEBP"),
    ):
        responses = await served.generate(
            prompt="a <cat-toy>", negative_prompt="blurry", seed=3, image_format=image_format
        )
        (image,) = images(responses)
        assert image.format == image_format
        assert Image.open(io.BytesIO(image.image)).format == name
        assert read_parameters(image.image) == {
            "prompt": "a <cat-toy>",
            "negative_prompt": "blurry",
            "concepts": {"<cat-toy>": make_concept().concept_id},
            "seed": 3,
            "sampler": "ddim",
            "num_inference_steps": 4,
            "guidance_scale": 7.5,
            "width": 64,
            "height": 64,
            "model": "fake",
        }


async def test_an_initial_image_sets_size_and_share_of_the_steps(served: Harness) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (43, 80), (200, 30, 30)).save(buffer, "PNG")
    responses = await served.generate(
        init_image=buffer.getvalue(), strength=0.5, num_inference_steps=10
    )
    assert (responses[0].accepted.width, responses[0].accepted.height) == (40, 80)
    assert [r.progress.num_steps for r in responses if r.HasField("progress")] == [5] * 5


async def test_text_without_room_is_reported(served: Harness) -> None:
    # 8 chunks of 14 tokens; the words beyond are cut.
    responses = await served.generate(prompt="cat " * 112 + "red dog", guidance_scale=1)
    summary = responses[-1].summary
    assert (summary.num_tokens, summary.num_chunks) == (112, 8)
    assert summary.cut_prompt.split() == ["reddog"] or summary.cut_prompt.split() == ["red", "dog"]


# Callers that leave, and callers that do not read


async def test_a_reader_that_lags_loses_old_steps_and_nothing_else() -> None:
    stream = EventStream(asyncio.get_running_loop())
    picture = np.zeros((8, 8, 3), np.uint8)
    stream.put(ImageDone(image_index=0, seed=0, image=picture))
    for number in range(1, 1001):
        stream.put(StepDone(image_index=1, step=number, num_steps=1000))
    stream.put(ImageDone(image_index=1, seed=1, image=picture))
    await asyncio.sleep(0)  # the loop takes over what other threads have put
    assert len(stream._events) == MAX_WAITING_STEPS + 2
    events = [await stream.get() for _ in range(MAX_WAITING_STEPS + 2)]
    assert isinstance(events[0], ImageDone) and isinstance(events[-1], ImageDone)
    steps = [event.step for event in events if isinstance(event, StepDone)]
    assert steps == list(range(1001 - MAX_WAITING_STEPS, 1001))


async def test_steps_that_nobody_follows_do_not_wake_the_loop() -> None:
    loop = LoopThatCounts()
    stream = EventStream(loop, follows_steps=lambda: False)
    for number in range(1, 6):
        stream.put(StepDone(image_index=0, step=number, num_steps=5))
    assert loop.calls == 0
    last = ImageDone(image_index=0, seed=0, image=np.zeros((8, 8, 3), np.uint8), is_last=True)
    end = Failed(error=ValueError())
    stream.put(last)
    stream.put(end)
    assert loop.calls == 1, "the last image and the end are told together"
    assert [await stream.get(), await stream.get()] == [last, end]


async def test_steps_are_told_at_intervals_but_for_the_last_one_and_previews() -> None:
    now = 0.0
    loop = LoopThatCounts()
    stream = EventStream(loop, step_interval_s=0.1, clock=lambda: now)
    preview = np.zeros((8, 8, 3), np.uint8)
    for step in range(1, 9):
        for image in range(2):
            due = preview if step == 4 else None
            stream.put(StepDone(image_index=image, step=step, num_steps=8, preview=due))
        now += 0.03
    told = [await stream.get() for _ in range(loop.calls)]
    for image in range(2):
        steps = [e.step for e in told if isinstance(e, StepDone) and e.image_index == image]
        assert steps == [1, 4, 5, 8]  # at 0.00 s, the preview, at 0.12 s, the last


async def test_a_caller_that_waits_for_all_hears_nothing_of_steps(served: Harness) -> None:
    """Also where another one, with the same request id, follows them."""
    served.denoiser.gate.clear()
    request = GenerateRequest(prompt="a cat", request_id="r", seed=1)
    unary = asyncio.ensure_future(
        served.generation.GenerateImages(generation_pb2.GenerateImagesRequest(request=request))
    )
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    stream = aiter(served.generation.Generate(request))
    assert (await anext(stream)).accepted.repeated
    served.denoiser.gate.set()
    rest = [response async for response in stream]
    assert "progress" in kinds(rest)
    answer = await unary
    (image,) = [response.image for response in rest if response.HasField("image")]
    assert list(answer.images) == [image]


async def test_a_caller_that_leaves_frees_its_place_within_a_step(served: Harness) -> None:
    served.denoiser.gate.clear()
    call = served.generation.Generate(GenerateRequest(prompt="a cat", num_inference_steps=100))
    assert (await first_response(call)).HasField("accepted")
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    call.cancel()
    while served.server.generation.active:
        await asyncio.sleep(0.005)
    served.denoiser.gate.set()
    assert await served.is_idle()
    assert served.denoiser.num_calls == 1
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"


async def test_a_waiting_caller_that_leaves_is_not_begun(start_server: StartServer) -> None:
    served = await start_server(batcher=BatcherConfig(max_images_in_flight=1))
    served.denoiser.gate.clear()
    first = asyncio.create_task(served.generate(prompt="a cat"))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    second = served.generation.Generate(GenerateRequest(prompt="a dog"))
    accepted = await first_response(second)
    second.cancel()
    while served.server.generation.active == 2:
        await asyncio.sleep(0.005)
    served.denoiser.gate.set()
    await first
    assert accepted.accepted.queue_position == 0
    assert await served.is_idle()
    assert served.denoiser.num_calls == 4  # the first one's steps, no more


async def test_a_connection_that_breaks_frees_its_place(served: Harness) -> None:
    served.denoiser.gate.clear()
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = ImageGenerationServiceStub(channel)
        call = stub.Generate(GenerateRequest(prompt="a cat", num_inference_steps=100))
        assert (await first_response(call)).HasField("accepted")
        await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    while served.server.generation.active:  # until the server has noticed
        await asyncio.sleep(0.005)
    served.denoiser.gate.set()
    assert await served.is_idle()
    assert served.denoiser.num_calls == 1


async def test_many_cancelled_streams_leave_nothing_behind(served: Harness) -> None:
    await served.generate(prompt="a cat")
    gc.collect()
    tasks = len(asyncio.all_tasks())
    for turn in range(100):
        call = served.generation.Generate(
            GenerateRequest(prompt="a cat", num_inference_steps=100, preview_every_steps=1)
        )
        if turn % 3:  # before the first answer, after it, in the middle
            await call.read()
        if turn % 3 == 2:
            await call.read()
        call.cancel()
    assert await served.is_idle()
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"
    for _ in range(100):
        gc.collect()
        if len(asyncio.all_tasks()) <= tasks:
            break
        await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks()) <= tasks


async def test_a_caller_that_does_not_read_is_dropped(start_server: StartServer) -> None:
    served = await start_server(stall_timeout_s=0.2, limits=Limits(max_pixels=512 * 512))
    # A window that does not grow: else the transport takes some megabytes by itself.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    async with grpc.aio.insecure_channel(served.address, options=options) as channel:
        call = ImageGenerationServiceStub(channel).Generate(
            GenerateRequest(num_images=8, width=512, height=512, num_inference_steps=1)
        )
        assert (await first_response(call)).HasField("accepted")
        assert await served.is_idle()  # though nothing more was read
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
    assert caught.value.code() == StatusCode.CANCELLED
    assert "nothing was read for 0.2 s" in (caught.value.details() or "")
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"


async def test_a_caller_that_vanishes_while_it_is_dropped_is_no_error(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The status of a call waits behind the message that is not read, and is never sent."""
    served = await start_server(stall_timeout_s=0.1)
    request = GenerateRequest(prompt="a cat", num_inference_steps=4).SerializeToString()
    with caplog.at_level(logging.INFO):
        async with connected(served.address, None) as wire:
            await wire.send(settings(s4=0))  # a window that takes nothing
            await wire.send(opened(1, "/oneword.v1.ImageGenerationService/Generate"))
            await wire.send(frame(DATA, END_STREAM, 1, framed(request)))
            while not served.server.operations.calls_in_flight:
                await asyncio.sleep(0.005)
            assert await served.is_idle()  # dropped
            assert served.server.operations.calls_in_flight == 1  # and not told yet
            wire.reset()
            await ended(served)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"
