"""The other ways to ask for images: unary, by the batch, and again."""

import asyncio
import gc

import grpc
import grpc.aio
import pytest
from grpc import StatusCode

from engine.batching.batcher import BatcherConfig
from engine.planner import GenerationPlan
from protos.oneword.v1 import generation_pb2 as pb
from protos.oneword.v1 import server_info_pb2
from tests import service_harness
from tests.fakes import WAIT_S
from tests.service_harness import Harness, StartServer, field_of, first_response, images, kinds

# Fixtures.
start_server, served = service_harness.start_server, service_harness.served


async def test_one_answer_has_what_the_stream_has(served: Harness) -> None:
    request = pb.GenerateRequest(prompt="a cat", seed=3, num_images=3, num_inference_steps=4)
    streamed = await served.generate(prompt="a cat", seed=3, num_images=3)
    unary = await served.generation.GenerateImages(
        pb.GenerateImagesRequest(request=request), timeout=WAIT_S
    )
    assert list(unary.images) == images(streamed)
    assert (unary.accepted.seed, list(unary.summary.seeds)) == (3, [3, 4, 5])


async def test_a_repeated_request_is_carried_out_once(served: Harness) -> None:
    first = await served.generate(prompt="a cat", request_id="r-1")
    calls = served.denoiser.num_calls
    again = await served.generate(prompt="a cat", request_id="r-1")
    assert served.denoiser.num_calls == calls
    assert images(again) == images(first) and kinds(again) == ["accepted", "image", "summary"]
    assert not first[0].accepted.repeated and again[0].accepted.repeated
    assert again[0].accepted.request_id == first[0].accepted.request_id == "r-1"
    error = await served.refusal(prompt="a dog", request_id="r-1")
    assert error.code() is StatusCode.INVALID_ARGUMENT and field_of(error) == "request_id"


async def test_of_what_is_done_only_the_answers_are_kept(served: Harness) -> None:
    """A plan holds the embeddings of its prompts: half a megabyte at Stable Diffusion's size."""
    seed = 987654321  # tells these plans from those of other tests in this process
    for number in range(3):
        await served.generate(prompt="a cat", seed=seed, request_id=f"r-{number}")
    assert await served.is_idle()
    gc.collect()
    # Not `isinstance`, which asks every object in the process for its class.
    plans = [kept for kept in gc.get_objects() if type(kept) is GenerationPlan]
    assert not [plan for plan in plans if plan.request.seed == seed]
    again = await served.generate(prompt="a cat", seed=seed, request_id="r-0")
    assert again[0].accepted.repeated


async def test_a_hundred_callers_of_one_request_share_one_execution(served: Harness) -> None:
    served.denoiser.gate.clear()
    calls = [
        asyncio.create_task(served.generate(prompt="a cat", request_id="same")) for _ in range(100)
    ]
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    served.denoiser.gate.set()
    answers = await asyncio.gather(*calls)
    assert served.denoiser.num_calls == 4
    assert all(images(answer) == images(answers[0]) for answer in answers)


async def test_a_caller_that_comes_back_finds_its_request_where_it_is(served: Harness) -> None:
    served.denoiser.gate.clear()
    call = served.generation.Generate(
        pb.GenerateRequest(prompt="a cat", request_id="r", num_inference_steps=4), timeout=WAIT_S
    )
    await first_response(call)
    back = served.generation.Generate(
        pb.GenerateRequest(prompt="a cat", request_id="r", num_inference_steps=4), timeout=WAIT_S
    )
    assert (await first_response(back)).accepted.repeated
    call.cancel()
    served.denoiser.gate.set()
    rest: list[pb.GenerateResponse] = []
    while isinstance(response := await back.read(), pb.GenerateResponse):
        rest.append(response)
    assert kinds(rest)[-2:] == ["image", "summary"] and served.denoiser.num_calls == 4


async def test_the_seed_follows_from_the_id(start_server: StartServer) -> None:
    one, other = await start_server(), await start_server()
    first = await one.generate(prompt="a cat", request_id="r")
    elsewhere = await other.generate(prompt="a cat", request_id="r")
    assert images(first) == images(elsewhere)
    another = await other.generate(prompt="a cat", request_id="s")
    assert another[0].accepted.seed != first[0].accepted.seed


async def test_a_batch_ends_each_item_on_its_own(start_server: StartServer) -> None:
    served = await start_server(batcher=BatcherConfig(max_queued_images=4))
    requests = [
        pb.GenerateRequest(prompt="a cat", seed=seed, num_inference_steps=3) for seed in range(40)
    ]
    requests[7].width = 7
    call = served.generation.GenerateBatch(
        pb.GenerateBatchRequest(requests=requests), timeout=WAIT_S
    )
    found: dict[int, list[str]] = {}
    pictures: dict[int, bytes] = {}
    async for response in call:
        assert isinstance(response, pb.GenerateBatchResponse)
        if response.HasField("failure"):
            found.setdefault(response.index, []).append("failure")
            assert response.failure.code == StatusCode.INVALID_ARGUMENT.value[0]
            assert response.failure.reason == "INVALID_REQUEST"
            continue
        found.setdefault(response.index, []).append(response.response.WhichOneof("event") or "")
        if response.response.HasField("image"):
            pictures[response.index] = response.response.image.image
    assert found.pop(7) == ["failure"]
    assert len(found) == 39 and all(events[-1] == "summary" for events in found.values())
    alone = await served.generate(prompt="a cat", seed=20, num_inference_steps=3)
    assert pictures[20] == images(alone)[0].image


async def test_a_batch_without_items_or_with_too_many_is_refused(served: Harness) -> None:
    for count in (0, 257):
        call = served.generation.GenerateBatch(
            pb.GenerateBatchRequest(requests=[pb.GenerateRequest()] * count), timeout=WAIT_S
        )
        with pytest.raises(grpc.aio.AioRpcError, match="1 to 256 items") as refused:
            await call.read()
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT


async def test_a_batch_that_is_left_leaves_nothing(served: Harness) -> None:
    served.denoiser.gate.clear()
    requests = [pb.GenerateRequest(prompt="a cat")] * 30
    call = served.generation.GenerateBatch(
        pb.GenerateBatchRequest(requests=requests), timeout=WAIT_S
    )
    await call.read()
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    call.cancel()
    served.denoiser.gate.set()
    assert await served.is_idle()


async def test_priorities_and_ids_out_of_range_are_refused(served: Harness) -> None:
    error = await served.refusal(priority=10)
    assert error.code() is StatusCode.INVALID_ARGUMENT and field_of(error) == "priority"
    error = await served.refusal(request_id="x" * 65)
    assert error.code() is StatusCode.INVALID_ARGUMENT and field_of(error) == "request_id"


async def test_limits_are_published(served: Harness) -> None:
    info = await served.info.GetServerInfo(server_info_pb2.GetServerInfoRequest(), timeout=WAIT_S)
    assert (info.limits.max_batch_requests, info.limits.max_priority) == (256, 9)
    assert (info.limits.max_request_id_characters, info.limits.request_id_memory_s) == (64, 600.0)
    assert info.limits.max_message_bytes == 16 << 20 and not info.HasField("jobs")


async def test_a_caller_with_another_deadline_joins_a_request_that_waits(
    start_server: StartServer,
) -> None:
    """The queue is in order of deadlines: one that changes must not take the others along."""
    served = await start_server(batcher=BatcherConfig(max_images_in_flight=1))
    served.denoiser.gate.clear()
    first = asyncio.create_task(served.generate(prompt="a dog"))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    calls = [
        served.generation.Generate(
            pb.GenerateRequest(prompt="a cat", request_id=name, num_inference_steps=4),
            timeout=timeout,
        )
        for name, timeout in (("r", 40.0), ("s", 50.0), ("t", 60.0), ("r", 70.0), ("s", None))
    ]
    for call in calls:
        await first_response(call)
    served.denoiser.gate.set()
    for call in calls:
        kinds_of_call: list[str | None] = []
        while isinstance(response := await call.read(), pb.GenerateResponse):
            kinds_of_call.append(response.WhichOneof("event"))
        assert kinds_of_call[-2:] == ["image", "summary"]
    assert kinds(await first)[-1] == "summary"
