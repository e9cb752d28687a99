"""Many requests in one call: each ends on its own, and all end with the call."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest

from engine.errors import Cancelled, NumericalError, QueueFull
from engine.serving.batch_calls import CONCURRENT_ITEMS, answer_batch
from protos.oneword.v1.generation_pb2 import (
    Accepted,
    GenerateBatchResponse,
    GenerateRequest,
    GenerateResponse,
    ImageResult,
    Summary,
)


@dataclass
class Studio:
    """Follows requests, with as many images as the prompt is long; notes who is there at once."""

    failures: dict[str, list[Exception]] = field(default_factory=dict[str, list[Exception]])
    present: set[str] = field(default_factory=set[str])
    most: int = 0
    left: list[str] = field(default_factory=list[str])

    async def follow(
        self, request: GenerateRequest, server_id: str
    ) -> AsyncGenerator[GenerateResponse]:
        self.present.add(server_id)
        self.most = max(self.most, len(self.present))
        try:
            await asyncio.sleep(0)
            if waiting := self.failures.get(request.prompt):
                raise waiting.pop(0)
            yield GenerateResponse(accepted=Accepted(request_id=server_id))
            for index in range(len(request.prompt)):
                await asyncio.sleep(0)
                yield GenerateResponse(image=ImageResult(image_index=index))
            yield GenerateResponse(summary=Summary(model_name=request.prompt))
        finally:
            self.present.discard(server_id)
            self.left.append(server_id)


async def _answers(studio: Studio, *prompts: str) -> dict[int, list[str]]:
    told: dict[int, list[str]] = {}

    async def write(response: GenerateBatchResponse) -> None:
        await asyncio.sleep(0)
        kind = response.WhichOneof("event")
        event = response.response.WhichOneof("event") if kind == "response" else kind
        told.setdefault(response.index, []).append(event or "")

    requests = [GenerateRequest(prompt=prompt) for prompt in prompts]
    await answer_batch(requests, studio.follow, write, server_id="s")
    return told


async def test_each_item_has_its_events_in_order() -> None:
    told = await _answers(Studio(), "a", "bbb", "")
    assert told == {
        0: ["accepted", "image", "summary"],
        1: ["accepted", "image", "image", "image", "summary"],
        2: ["accepted", "summary"],
    }


async def test_a_failure_ends_its_item_alone() -> None:
    studio = Studio(failures={"bad": [NumericalError("not finite")]})
    told = await _answers(studio, "a", "bad", "b")
    assert told[1] == ["failure"] and told[0] == told[2] == ["accepted", "image", "summary"]


async def test_an_item_waits_for_room_in_the_queue() -> None:
    full: list[Exception] = [QueueFull("full", retry_after_s=0.0) for _ in range(5)]
    told = await _answers(Studio(failures={"a": full}), "a")
    assert told == {0: ["accepted", "image", "summary"]}


async def test_a_large_batch_leaves_room_for_others_and_is_done() -> None:
    studio = Studio()
    told = await _answers(studio, *["ab"] * 100)
    assert len(told) == 100 and all(len(events) == 4 for events in told.values())
    assert studio.most == CONCURRENT_ITEMS
    assert sorted(studio.left) == sorted(f"s-{index}" for index in range(100))


async def test_nothing_goes_on_for_a_caller_that_is_gone() -> None:
    studio = Studio()

    async def write(response: GenerateBatchResponse) -> None:
        raise Cancelled("nothing was read")

    with pytest.raises(Cancelled, match="nothing was read"):
        requests = [GenerateRequest(prompt="abc")] * 40
        await answer_batch(requests, studio.follow, write, server_id="s")
    assert not studio.present and len(studio.left) <= CONCURRENT_ITEMS + 1
