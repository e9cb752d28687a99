"""Databases that others hold, remove or overwrite while a server has them open."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from engine.errors import StoreError
from engine.image_jobs.database import FILE
from engine.image_jobs.job import JobLimits
from engine.image_jobs.store import ImageJobStore
from engine.store.sqlite import INDEX
from protos.oneword.v1 import generation_pb2 as pb
from tests.faults.process import Refusal, RunningServer, outcome_of, refusal, running

UNAVAILABLE = StatusCode.UNAVAILABLE
Loss = Callable[[Path], None]


@pytest.fixture
def server(emoji_bundle_path: Path, tmp_path: Path) -> Iterator[RunningServer]:
    with running(emoji_bundle_path, tmp_path / "store", tmp_path / "log") as server:
        yield server
        server.check_log()


def test_an_index_that_another_process_holds_is_read_and_written_later(
    server: RunningServer,
) -> None:
    server.publish("<kept>")
    pictures = server.draw(prompt="a <kept> dog")
    index = server.folder / "concepts" / INDEX
    with closing(sqlite3.connect(index, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for _ in range(2):
            held = refusal(lambda: server.publish("<new>"))
            assert (held.code, held.retry_after_s) == (UNAVAILABLE, 1.0)
            assert "database is locked; try again" in held.text
        assert server.draw(prompt="a <kept> dog") == pictures
        assert server.concepts() == ["<kept>"]
        job = server.submit(prompt="a <kept> dog")  # its concepts are read, and kept with it
        assert server.images_of_job(job.job_id) == pictures
    assert server.publish("<new>").changed
    jobs = server.folder / "jobs" / FILE
    with closing(sqlite3.connect(jobs, timeout=0.0, isolation_level=None)) as other:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN EXCLUSIVE")  # the jobs are the server's alone
    assert server.images_of_job(server.submit().job_id) == server.draw()
    assert server.end() == 0


def _remove(path: Path) -> None:
    path.unlink()


def _remove_folder(path: Path) -> None:
    """As `rm -r`, or an `mv` of the folder, would."""
    path.parent.rename(path.parent.with_suffix(".elsewhere"))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(os.urandom(path.stat().st_size))
    os.replace(other, path)


@pytest.mark.parametrize("lose", [_remove, _remove_folder, _replace])
def test_nothing_is_acknowledged_that_a_lost_database_would_lose(
    server: RunningServer, lose: Loss
) -> None:
    server.publish("<kept>")
    pictures = server.draw(prompt="a <kept> dog")
    job = server.submit(request_id="before")
    assert server.images_of_job(job.job_id) == server.draw()
    lose(server.folder / "concepts" / INDEX)
    lose(server.folder / "jobs" / FILE)
    changes: list[Callable[[], Any]] = [
        lambda: server.publish("<new>"),
        lambda: server.publish("<kept>", value=0.2, overwrite=True),
        server.submit,
        lambda: server.stubs.jobs.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id), timeout=9.0),
    ]
    for change in 2 * changes:
        refused = refusal(change)
        assert (refused.code, refused.retry_after_s) == (UNAVAILABLE, 1.0)
        assert "removed or replaced while it was in use" in refused.text
    # What is in memory, or in the files that are still open, is told.
    assert server.draw(prompt="a dog") == server.draw(prompt="a dog")
    assert server.draw(prompt="a <kept> dog") == pictures
    assert server.submit(request_id="before").job_id == job.job_id
    assert server.end() == 0


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_jobs_go_on_when_their_database_is_put_back(tmp_path: Path, suffix: str) -> None:
    store = ImageJobStore(tmp_path, JobLimits())
    submit: dict[str, Any] = {"tenant": "a", "body": b"", "shown": b"", "pinned": b""}
    submit |= {"priority": 0}
    first = store.submit(request_id="1", **submit)
    path, away = tmp_path / f"{FILE}{suffix}", tmp_path / "away"
    path.rename(away)
    for _ in range(2):
        with pytest.raises(StoreError, match="removed or replaced"):
            store.submit(request_id="2", **submit)
    assert store.get(first.job_id, tenant="a") == first
    away.rename(path)
    second = store.submit(request_id="2", **submit)
    store.close()
    again = ImageJobStore(tmp_path, JobLimits())
    assert {job.job_id for job in again.list(tenant="a", limit=9)} == {first.job_id, second.job_id}
    again.close()


def test_databases_that_are_overwritten_in_place_are_no_internal_error(
    server: RunningServer,
) -> None:
    """Nobody can promise to notice; but what is noticed is said as what it is."""
    server.publish("<kept>")
    server.images_of_job(server.submit().job_id)
    for path in (server.folder / "concepts" / INDEX, server.folder / "jobs" / FILE):
        for file in (path, path.with_name(f"{path.name}-wal")):
            with file.open("r+b") as opened:
                opened.write(os.urandom(file.stat().st_size))
    calls: list[Callable[[], Any]] = [
        server.concepts,
        lambda: server.publish("<new>"),
        server.submit,
        lambda: server.draw(prompt="a <kept> dog"),
    ]
    for call in 2 * calls:
        outcome = outcome_of(call)
        assert not isinstance(outcome, Refusal) or outcome.code is UNAVAILABLE, outcome
    assert server.draw() == server.draw()
    assert server.end() == 0
