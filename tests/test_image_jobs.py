"""Jobs on disk, and how they are carried out: laws of the store and the runner without a server."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.errors import (
    ConfigError,
    InvalidRequest,
    JobNotEnded,
    NumericalError,
    QueueFull,
    StoreError,
    UnknownJob,
    WorkerDied,
)
from engine.image_jobs.database import FILE
from engine.image_jobs.job import ImageJob, JobLimits
from engine.image_jobs.runner import MAX_ATTEMPTS, ImageJobRunner
from engine.image_jobs.store import ImageJobStore
from protos.oneword.v1.generation_pb2 import (
    Failure,
    GenerateRequest,
    GenerateResponse,
    ImageResult,
    Progress,
    Summary,
)
from tests.fakes import WAIT_S


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        self.now += 0.001  # no two things at the same time
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[ImageJobStore]:
    opened = ImageJobStore(tmp_path, JobLimits(max_open_jobs=5), clock=clock)
    yield opened
    opened.close()


def submit(store: ImageJobStore, prompt: str = "cat", **fields: Any) -> ImageJob:
    given: dict[str, Any] = {"tenant": "a", "request_id": "", "priority": 0, **fields}
    num_images = given.pop("num_images", 2)
    request = GenerateRequest(prompt=prompt, seed=7, num_images=num_images)
    return store.submit(
        body=prompt.encode(), shown=b"", pinned=request.SerializeToString(), **given
    )


# The store


def test_the_same_request_id_gives_the_same_job(store: ImageJobStore) -> None:
    first = submit(store, request_id="r")
    assert submit(store, request_id="r") == first
    assert store.find_request("r", b"cat", tenant="a") == first
    assert submit(store, request_id="r", tenant="b").job_id != first.job_id
    with pytest.raises(InvalidRequest, match="with another request"):
        submit(store, "dog", request_id="r")
    with pytest.raises(InvalidRequest, match="with another request"):
        store.find_request("r", b"dog", tenant="a")


def test_jobs_of_others_are_unknown(store: ImageJobStore) -> None:
    job = submit(store)
    for call in (store.get, store.cancel, store.delete):
        with pytest.raises(UnknownJob) as of_other:
            call(job.job_id, tenant="b")
        with pytest.raises(UnknownJob) as of_nobody:
            call("0" * 32, tenant="b")
        assert str(of_other.value).replace(job.job_id, "0" * 32) == str(of_nobody.value)
    assert store.list(tenant="b", limit=9) == []


def test_open_jobs_of_a_tenant_are_bounded(store: ImageJobStore) -> None:
    jobs = [submit(store, f"{number}") for number in range(5)]
    with pytest.raises(QueueFull, match="5 jobs are waiting or running, the limit is 5"):
        submit(store)
    submit(store, tenant="b")
    store.cancel(jobs[0].job_id, tenant="a")
    submit(store)


def test_lists_are_complete_and_the_latest_is_first(store: ImageJobStore) -> None:
    jobs = [submit(store, f"{number}") for number in range(5)]
    pages, before = [], None
    while page := store.list(tenant="a", limit=2, before=before):
        pages.append([job.body for job in page])
        before = page[-1].create_time, page[-1].job_id
    assert pages == [[b"4", b"3"], [b"2", b"1"], [b"0"]]
    assert store.get(jobs[3].job_id, tenant="a") == jobs[3]


def test_turns_go_round_tenants_then_by_priority_then_by_age(store: ImageJobStore) -> None:
    for prompt, tenant, priority in (("1", "a", 0), ("2", "a", 5), ("3", "a", 5), ("4", "b", 0)):
        submit(store, prompt, tenant=tenant, priority=priority)
    order, running = [], dict[str, int]()
    while found := store.begin_next(running):
        job, _ = found
        running[job.tenant] = running.get(job.tenant, 0) + 1
        order.append(job.body.decode())
        assert (job.status, job.attempts) == ("running", 1)
    assert order == ["2", "4", "3", "1"]


def test_a_server_that_comes_back_takes_up_what_was_left(tmp_path: Path, clock: Clock) -> None:
    store = ImageJobStore(tmp_path, JobLimits(), clock=clock)
    jobs = {name: submit(store, name) for name in ("waits", "runs", "stops", "done")}
    for job in [jobs["runs"], jobs["stops"], jobs["done"]]:
        store._database.connection.execute(
            "UPDATE jobs SET status = 'running', attempts = 1 WHERE job_id = ?", (job.job_id,)
        )
    store.cancel(jobs["stops"].job_id, tenant="a")
    store.end(jobs["done"].job_id, "succeeded", summary=b"s")
    store.close()
    again = ImageJobStore(tmp_path, JobLimits(), clock=clock)
    assert again.recover() == 1
    found = {job.body.decode(): job for job in again.list(tenant="a", limit=9)}
    statuses = {name: job.status for name, job in found.items()}
    assert statuses == {
        "waits": "queued", "runs": "queued", "stops": "cancelled", "done": "succeeded"
    }  # fmt: skip
    assert found["runs"].attempts == 1 and found["done"].summary == b"s"
    again.close()


def test_ended_jobs_stay_as_they_ended(store: ImageJobStore) -> None:
    job = submit(store)
    store.end(job.job_id, "failed", failure=b"f")
    ended = store.get(job.job_id, tenant="a")
    store.end(job.job_id, "succeeded", summary=b"s")
    store.requeue(job.job_id, counts=True)
    assert store.cancel(job.job_id, tenant="a") == ended == store.get(job.job_id, tenant="a")
    assert (ended.status, ended.failure, ended.end_time is not None) == ("failed", b"f", True)


def test_only_ended_jobs_are_deleted_and_their_images_with_them(store: ImageJobStore) -> None:
    job = submit(store)
    store.keep_image(job.job_id, 0, b"one")
    store.keep_image(job.job_id, 0, b"other")  # made again: the first stays
    assert store.images(job.job_id) == {0: b"one"} and store.indices(job.job_id) == {0}
    with pytest.raises(JobNotEnded, match="is queued; cancel it"):
        store.delete(job.job_id, tenant="a")
    store.cancel(job.job_id, tenant="a")
    store.delete(job.job_id, tenant="a")
    with pytest.raises(UnknownJob):
        store.get(job.job_id, tenant="a")
    assert store.images(job.job_id) == {}


def test_old_jobs_and_the_oldest_of_too_many_images_are_forgotten(
    tmp_path: Path, clock: Clock
) -> None:
    store = ImageJobStore(tmp_path, JobLimits(keep_s=100.0, max_kept_bytes=250), clock=clock)
    jobs = [submit(store, f"{number}") for number in range(4)]
    for job in jobs[:3]:
        store.keep_image(job.job_id, 0, b"x" * 100)
        store.end(job.job_id, "succeeded")
    assert store.forget_old() == 1  # 300 bytes: the first to end goes
    left = [job.body for job in store.list(tenant="a", limit=9)]
    assert left == [b"3", b"2", b"1"]
    clock.now += 200.0
    assert store.forget_old() == 2
    assert [job.body for job in store.list(tenant="a", limit=9)] == [b"3"]  # has not ended
    store.close()


def test_a_second_server_and_other_databases_are_refused(tmp_path: Path) -> None:
    store = ImageJobStore(tmp_path, JobLimits())
    script = (
        "import sys; from pathlib import Path; import engine.image_jobs.database as jobs;"
        "jobs.BUSY_TIMEOUT_S = 0.1; jobs.JobDatabase(Path(sys.argv[1]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.returncode and "database is locked" in found.stderr
    store.close()
    other = tmp_path / "other"
    other.mkdir()
    import sqlite3

    database = sqlite3.connect(other / FILE)
    database.execute("CREATE TABLE mine (x)")
    database.close()
    with pytest.raises(ConfigError, match="no database of jobs"):
        ImageJobStore(other, JobLimits())


def test_what_was_accepted_survives_a_kill(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from engine.image_jobs.job import JobLimits
from engine.image_jobs.store import ImageJobStore
store = ImageJobStore(Path(sys.argv[1]), JobLimits())
for number in range(1000):
    job = store.submit(tenant="a", request_id=str(number), body=b"", shown=b"", pinned=b"p",
                       priority=0)
    store.keep_image(job.job_id, 0, str(number).encode())
    print(job.job_id, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    told = [process.stdout.readline().strip() for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    told += [line.strip() for line in process.stdout if line.endswith("\n")]
    process.wait()
    process.stdout.close()
    store = ImageJobStore(tmp_path, JobLimits())
    for number, job_id in enumerate(told):
        assert store.get(job_id, tenant="a").request_id == str(number)
        assert store.images(job_id) == {0: str(number).encode()}
    store.close()


def test_a_disk_that_fails_is_a_store_error(store: ImageJobStore) -> None:
    store._database.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="jobs cannot be read or written now: attempt to write"):
        submit(store)


# The runner


@dataclass
class Studio:
    """Makes the images of jobs, unless it is told to fail; notes what it was asked for."""

    asked: list[GenerateRequest] = field(default_factory=list[GenerateRequest])
    failures: list[Exception] = field(default_factory=list[Exception])
    stop_at: int | None = None  # an image that is never done
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(
        self, request: GenerateRequest, job: ImageJob
    ) -> AsyncGenerator[GenerateResponse]:
        self.asked.append(request)
        if self.failures:
            raise self.failures.pop(0)
        for index in range(request.num_images):
            yield GenerateResponse(progress=Progress(image_index=index, step=1, num_steps=3))
            if self.stop_at == index:
                await self.gate.wait()
            seed = request.seed + index
            image = ImageResult(image_index=index, seed=seed, image=f"{seed}".encode())
            yield GenerateResponse(image=image)
        yield GenerateResponse(summary=Summary(seeds=[request.seed], model_name="m"))


@asynccontextmanager
async def running(store: ImageJobStore, studio: Studio, **more: Any) -> AsyncGenerator[Any]:
    runner = ImageJobRunner(store, studio.follow, **more)
    await runner.start()
    try:
        yield runner
    finally:
        await runner.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


def seeds_of(store: ImageJobStore, job: ImageJob) -> list[int]:
    images = [ImageResult.FromString(content) for content in store.images(job.job_id).values()]
    assert [image.image_index for image in images] == list(range(len(images)))
    return [image.seed for image in images]


async def test_a_job_is_carried_out_and_its_images_are_kept(store: ImageJobStore) -> None:
    job = submit(store, num_images=3)
    async with running(store, Studio()):
        await until(lambda: store.get(job.job_id, tenant="a").has_ended)
    ended = store.get(job.job_id, tenant="a")
    assert ended.status == "succeeded" and ended.summary
    assert list(Summary.FromString(ended.summary).seeds) == [7, 8, 9]
    assert seeds_of(store, job) == [7, 8, 9]


async def test_a_stopped_server_goes_on_behind_the_last_image(store: ImageJobStore) -> None:
    job, studio = submit(store, num_images=3), Studio(stop_at=1)
    async with running(store, studio):
        await until(lambda: store.indices(job.job_id) == {0})
    left = store.get(job.job_id, tenant="a")
    assert (left.status, left.attempts) == ("queued", 0)
    studio.stop_at = None
    async with running(store, studio):
        await until(lambda: store.get(job.job_id, tenant="a").has_ended)
    assert [(one.seed, one.num_images) for one in studio.asked] == [(7, 3), (8, 2)]
    assert seeds_of(store, job) == [7, 8, 9]


async def test_a_worker_that_dies_often_fails_the_job_and_no_other(store: ImageJobStore) -> None:
    job = submit(store)
    studio = Studio(failures=[WorkerDied("gone") for _ in range(MAX_ATTEMPTS)])
    async with running(store, studio) as runner:
        await until(lambda: store.get(job.job_id, tenant="a").has_ended)
        assert store.get(job.job_id, tenant="a").status == "failed"
        other = submit(store, "dog")
        sound = submit(store, "fox")
        runner.wake()
        await until(lambda: store.get(sound.job_id, tenant="a").has_ended)
    assert store.get(other.job_id, tenant="a").status == "succeeded"


async def test_a_disk_that_fails_for_a_while_costs_no_job(
    store: ImageJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.image_jobs.runner._RETRY_S", 0.0)
    requeue, refusals = store.requeue, iter(range(2))

    def reluctant(job_id: str, *, counts: bool) -> None:
        if next(refusals, None) is not None:
            raise StoreError("the disk is full")
        requeue(job_id, counts=counts)

    monkeypatch.setattr(store, "requeue", reluctant)
    job = submit(store)
    studio = Studio(failures=[StoreError("the disk is full") for _ in range(MAX_ATTEMPTS + 2)])
    async with running(store, studio):
        await until(lambda: store.get(job.job_id, tenant="a").has_ended)
    ended = store.get(job.job_id, tenant="a")
    assert (ended.status, ended.attempts) == ("succeeded", 1)


async def test_a_full_queue_is_waited_for(store: ImageJobStore) -> None:
    job = submit(store)
    studio = Studio(failures=[QueueFull("full", retry_after_s=0.0) for _ in range(20)])
    async with running(store, studio):
        await until(lambda: store.get(job.job_id, tenant="a").has_ended)
    assert store.get(job.job_id, tenant="a").status == "succeeded" and len(studio.asked) == 21


async def test_a_failure_says_why(store: ImageJobStore) -> None:
    job = submit(store)
    async with running(store, Studio(failures=[NumericalError("not finite")])):
        await until(lambda: store.get(job.job_id, tenant="a").has_ended)
    ended = store.get(job.job_id, tenant="a")
    assert ended.status == "failed" and ended.failure
    failure = Failure.FromString(ended.failure)
    assert (failure.message, failure.reason) == ("not finite", "NUMERICAL_ERROR")


async def test_a_cancelled_job_stops_and_keeps_what_is_done(store: ImageJobStore) -> None:
    job, studio = submit(store, num_images=3), Studio(stop_at=1)
    async with running(store, studio) as runner:
        await until(lambda: store.indices(job.job_id) == {0})
        assert (await runner.cancel(job.job_id, tenant="a")).status == "cancelling"
        await until(lambda: store.get(job.job_id, tenant="a").has_ended)
    assert store.get(job.job_id, tenant="a").status == "cancelled"
    assert seeds_of(store, job) == [7]


async def test_every_watcher_hears_of_every_change(store: ImageJobStore) -> None:
    job, studio = submit(store, num_images=2), Studio(stop_at=1)
    heard: list[set[str]] = [set(), set()]

    async def watch(place: int, runner: ImageJobRunner) -> None:
        async with asyncio.timeout(WAIT_S):
            while "succeeded" not in heard[place]:
                changed = runner.changed(job.job_id)
                heard[place].add(store.get(job.job_id, tenant="a").status)
                if "succeeded" not in heard[place]:
                    await changed.wait()

    async with running(store, studio) as runner:
        watchers = [asyncio.create_task(watch(place, runner)) for place in range(2)]
        leaves = asyncio.create_task(watch(0, runner))
        await until(lambda: runner.progress(job.job_id) == (2, 6))
        leaves.cancel()
        studio.gate.set()
        await asyncio.gather(*watchers)
    assert all({"running", "succeeded"} <= one for one in heard)


async def test_at_most_so_many_jobs_run(store: ImageJobStore) -> None:
    studio = Studio(stop_at=0)
    jobs = [submit(store, f"{number}") for number in range(4)]
    async with running(store, studio, max_running=2):
        await until(lambda: len(studio.asked) == 2)
        statuses = [store.get(job.job_id, tenant="a").status for job in jobs]
        assert statuses.count("running") == 2
        studio.gate.set()
        await until(lambda: all(store.get(j.job_id, tenant="a").has_ended for j in jobs))
