"""One execution for each request, however many callers wait: laws without a server."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from engine.errors import InvalidRequest, NumericalError
from engine.serving.executions import (
    MAX_WAITING_PROGRESS,
    Execution,
    Executions,
    Memory,
    Reader,
    Started,
    seed_of,
)
from engine.serving.streams import EventStream
from protos.oneword.v1.generation_pb2 import (
    Accepted,
    GenerateRequest,
    GenerateResponse,
    ImageResult,
    Progress,
    Summary,
)
from tests.fakes import WAIT_S


@dataclass
class FakeJob:
    deadline: float | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Stage:
    """Executions whose work is done by the test, event by event."""

    memory: Memory = field(default_factory=Memory)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.executions = Executions(self._start, memory=self.memory, clock=lambda: self.now)
        self.started: list[Execution] = []
        self.jobs: list[FakeJob] = []
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.refusal: Exception | None = None

    @asynccontextmanager
    async def _start(
        self, execution: Execution, request: GenerateRequest, events: EventStream
    ) -> AsyncGenerator[Started]:
        await self.may_start.wait()
        if self.refusal:
            raise self.refusal
        self.started.append(execution)
        self.jobs.append(FakeJob())
        accepted = GenerateResponse(accepted=Accepted(request_id=execution.name))
        job = self.jobs[-1]
        yield Started(
            cancel=job.cancel,
            set_deadline=partial(setattr, job, "deadline"),
            accepted=accepted,
            reply=self._reply,
        )

    async def _reply(self, event: Any) -> GenerateResponse:
        raise AssertionError("the test tells what there is to tell")

    def reading(self, prompt: str = "cat", request_id: str = "", **fields: Any) -> Any:
        given: dict[str, Any] = {"tenant": "a", "server_id": "s", "deadline": None, **fields}
        request = GenerateRequest(prompt=prompt, request_id=request_id)
        return self.executions.reading(request, **given)


def _image(index: int = 0) -> GenerateResponse:
    return GenerateResponse(image=ImageResult(image_index=index, image=b"x" * 100))


def _progress(step: int) -> GenerateResponse:
    return GenerateResponse(progress=Progress(step=step))


SUMMARY = GenerateResponse(summary=Summary(model_name="m"))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


async def _next(events: AsyncIterator[GenerateResponse]) -> GenerateResponse:
    async with asyncio.timeout(WAIT_S):
        return await anext(events)


async def _finish(stage: Stage, execution: Execution) -> None:
    """What `_carry_out` does at the end of a sound execution."""
    assert execution.task
    execution.task.cancel()
    execution.tell(_image())
    execution.tell(SUMMARY)
    execution.end()
    stage.executions._remember(execution)


async def test_a_second_call_reads_from_the_execution_of_the_first() -> None:
    stage = Stage()
    async with stage.reading(request_id="r") as first, stage.reading(request_id="r") as second:
        await _until(lambda: bool(stage.started))
        one, two = aiter(first), aiter(second)
        assert not (await _next(one)).accepted.repeated
        assert (await _next(two)).accepted.repeated
        stage.started[0].tell(_progress(1))
        stage.started[0].tell(_image())
        for events in (one, two):
            assert (await _next(events)).progress.step == 1
            assert (await _next(events)).HasField("image")
        async with stage.reading(request_id="r") as late:
            events = aiter(late)
            assert [(await _next(events)).WhichOneof("event") for _ in range(2)] == [
                "accepted",
                "image",
            ]
    assert len(stage.started) == 1


async def test_what_is_done_is_told_again_until_it_is_forgotten() -> None:
    stage = Stage(memory=Memory(seconds=10.0))
    async with stage.reading(request_id="r"):
        await _until(lambda: bool(stage.started))
        await _finish(stage, stage.started[0])
    stage.now = 9.0
    async with stage.reading(request_id="r") as again:
        told = [response.WhichOneof("event") async for response in again]
    assert told == ["accepted", "image", "summary"] and len(stage.started) == 1
    stage.now = 10.0
    async with stage.reading(request_id="r"):
        await _until(lambda: len(stage.started) == 2)


@pytest.mark.parametrize("memory", [Memory(max_bytes=350), Memory(max_requests=3)])
async def test_memory_is_bounded_and_the_oldest_go_first(memory: Memory) -> None:
    stage = Stage(memory=memory)
    for number in range(10):
        async with stage.reading(request_id=f"r{number}"):
            await _until(lambda wanted=number + 1: len(stage.started) == wanted)
            await _finish(stage, stage.started[-1])
    known = [key.request_id for key in stage.executions._by_key]
    assert known == ["r7", "r8", "r9"]
    assert stage.executions._num_bytes == sum(e.num_bytes for e in stage.started[-3:])


async def test_unnamed_requests_are_never_the_same_and_leave_nothing() -> None:
    stage = Stage()
    async with stage.reading(server_id="1"), stage.reading(server_id="2"):
        await _until(lambda: len(stage.started) == 2)
        for execution in stage.started:
            await _finish(stage, execution)
    assert not stage.executions._by_key and not stage.executions._done


async def test_one_id_names_one_request() -> None:
    stage = Stage()
    async with stage.reading("cat", request_id="r"):
        with pytest.raises(InvalidRequest, match="used for another request"):
            async with stage.reading("dog", request_id="r"):
                pass
    for bad in ("x" * 65, "a\nb", "ä"):
        with pytest.raises(InvalidRequest, match="printable ASCII"):
            async with stage.reading(request_id=bad):
                pass


async def test_tenants_do_not_share_ids() -> None:
    stage = Stage()
    async with stage.reading("cat", request_id="r"):
        async with stage.reading("dog", request_id="r", tenant="b") as other:
            await _until(lambda: len(stage.started) == 2)
            assert not other.repeated
    assert seed_of("a", "r") != seed_of("b", "r") == seed_of("b", "r")


async def test_requests_that_the_server_calls_alike_are_not_the_same() -> None:
    """A caller may choose that name by a header."""
    stage = Stage()
    async with stage.reading("cat", server_id="known"), stage.reading("dog", server_id="known"):
        async with stage.reading("cat", request_id="known") as other:
            await _until(lambda: len(stage.started) == 3)
            assert not other.repeated
    assert [execution.name for execution in stage.started] == ["known"] * 3


async def test_the_work_ends_with_the_last_reader() -> None:
    stage = Stage()
    async with stage.reading(request_id="r"):
        async with stage.reading(request_id="r"):
            await _until(lambda: bool(stage.started))
        await asyncio.sleep(0)
        assert not stage.jobs[0].cancelled
    await _until(lambda: stage.jobs[0].cancelled)
    async with stage.reading(request_id="r"):
        await _until(lambda: len(stage.started) == 2)  # anew


async def test_a_caller_that_leaves_while_it_is_planned_does_not_take_the_other_along() -> None:
    stage = Stage()
    stage.may_start.clear()

    async def call() -> str:
        async with stage.reading(request_id="r") as reader:
            return (await _next(aiter(reader))).accepted.request_id

    first, second = asyncio.create_task(call()), asyncio.create_task(call())
    await asyncio.sleep(0)
    first.cancel()
    stage.may_start.set()
    async with asyncio.timeout(WAIT_S):
        assert await second == "r"
    assert len(stage.started) == 1


async def test_a_failure_is_told_to_all_and_is_not_remembered() -> None:
    stage = Stage()
    stage.refusal = NumericalError("not finite")
    async with stage.reading(request_id="r") as one, stage.reading(request_id="r") as two:
        for reader in (one, two):
            with pytest.raises(NumericalError):
                await _next(aiter(reader))
    stage.refusal = None
    async with stage.reading(request_id="r"):
        await _until(lambda: len(stage.started) == 1)


async def test_the_longest_deadline_counts() -> None:
    stage = Stage()
    async with stage.reading(request_id="r", deadline=5.0):
        await _until(lambda: bool(stage.started))
        await _until(lambda: stage.started[0].started is not None)
        assert stage.jobs[0].deadline == 5.0
        async with stage.reading(request_id="r", deadline=7.0):
            assert stage.jobs[0].deadline == 7.0
        async with stage.reading(request_id="r", deadline=6.0):
            assert stage.jobs[0].deadline == 7.0
        async with stage.reading(request_id="r", deadline=None):
            assert stage.jobs[0].deadline is None


async def test_a_reader_that_lags_loses_old_progress_and_nothing_else() -> None:
    stage = Stage()
    async with stage.reading() as reader:
        await _until(lambda: bool(stage.started) and bool(stage.started[0].told))
        for step in range(1, 1001):
            stage.started[0].tell(_progress(step))
            if step % 500 == 0:
                stage.started[0].tell(_image(step))
        assert isinstance(reader, Reader)
        await _finish(stage, stage.started[0])
        told = [response async for response in reader]
    steps = [response.progress.step for response in told if response.HasField("progress")]
    assert steps == list(range(1001 - MAX_WAITING_PROGRESS, 1001))
    kinds = [r.WhichOneof("event") for r in told if not r.HasField("progress")]
    assert kinds == ["accepted", "image", "image", "image", "summary"]
