"""A disk that is full, and then read-only, under the concepts and jobs of a running server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from engine.client import Client
from engine.client.errors import ServerError
from protos.oneword.v1 import generation_pb2 as pb
from tests.faults.machine import Machine, fill, small_disk
from tests.faults.process import (
    Refusal,
    RunningServer,
    concept_file,
    outcome_of,
    refusal,
    running,
    until,
)

# Of a job that is under way for long enough to pull its disk away.
LONG: dict[str, Any] = {"num_images": 8, "num_inference_steps": 10}
FULL = StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def full(emoji_bundle_path: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server whose concepts and jobs are on a disk of their own, of 4 MiB."""
    with (
        small_disk(tmp_path / "disk", "4m") as disk,
        running(emoji_bundle_path, disk, tmp_path / "log") as server,
    ):
        yield server
        assert server.end() == 0
        server.check_log()


def test_a_full_disk_refuses_what_it_cannot_keep_and_nothing_else(full: RunningServer) -> None:
    full.publish("<kept>")
    pictures = full.draw(prompt="a <kept> dog")
    before = full.submit(prompt="a <kept> dog", request_id="before")
    assert full.images_of_job(before.job_id) == pictures
    filler = fill(full.folder)
    for _ in range(3):
        publishing = refusal(lambda: full.publish("<new>"))
        assert (publishing.code, publishing.retry_after_s) == (FULL, None)
        assert "see to its disk" in publishing.text
    submitting, accepted = _fill_with_jobs(full)
    assert (submitting.code, submitting.retry_after_s) == (FULL, None)
    assert "database or disk is full" in submitting.text
    with Client(full.address) as client, pytest.raises(ServerError) as caught:
        client.import_concept(concept_file("<new>"))
    assert caught.value.attempts == 1, "nobody knows when there will be room"
    # All that needs no room goes on.
    assert full.draw(prompt="a <kept> dog") == pictures
    assert full.concepts() == ["<kept>"]
    assert full.images_of_job(before.job_id) == pictures
    filler.unlink()
    assert full.publish("<new>").changed
    assert full.submit(prompt="a <kept> dog", request_id="before").job_id == before.job_id
    for job_id in accepted:
        assert len(full.images_of_job(job_id)) == 1
    assert full.concepts() == ["<kept>", "<new>"]


def _fill_with_jobs(server: RunningServer) -> tuple[Refusal, list[str]]:
    """The refusal of the first job that there is no room for, and the jobs before it: pages that
    the database had before may still take some."""
    accepted: list[str] = []
    while True:
        outcome = outcome_of(lambda: server.submit(prompt="dog " * 2000))
        if isinstance(outcome, Refusal):
            return outcome, accepted
        accepted.append(outcome.job_id)
        assert len(accepted) < 300


def test_a_job_whose_disk_is_full_goes_on_when_there_is_room(full: RunningServer) -> None:
    pictures = full.draw(**LONG)
    job = full.submit(**LONG)
    until(lambda: full.job(job.job_id).steps_done > 10, "steps")
    filler = fill(full.folder)
    until(lambda: "jobs cannot be read or written now" in full.log.read_text(), "a full disk")
    assert full.job(job.job_id).state in (pb.JOB_STATE_RUNNING, pb.JOB_STATE_QUEUED)
    filler.unlink()
    assert full.images_of_job(job.job_id) == pictures


def test_a_disk_that_becomes_read_only_is_read(emoji_bundle_path: Path, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    folder = tmp_path / "store"
    environment = machine.environment
    log = tmp_path / "log"
    with running(emoji_bundle_path, folder, log, environment=environment) as server:
        server.publish("<kept>")
        pictures = server.draw(prompt="a <kept> dog", **LONG)
        job = server.submit(prompt="a <kept> dog", **LONG)
        until(lambda: server.job(job.job_id).steps_done > 10, "steps")
        with machine.read_only(folder):
            for call in (lambda: server.publish("<new>"), server.submit):
                refused = refusal(call)
                assert refused.code is StatusCode.UNAVAILABLE
                assert refused.retry_after_s == 1.0
                assert "try again" in refused.text
            assert server.draw(prompt="a <kept> dog", **LONG) == pictures
            assert server.concepts() == ["<kept>"]
            assert server.job(job.job_id).num_images_done < LONG["num_images"]
        assert server.publish("<new>").changed
        assert server.images_of_job(job.job_id) == pictures
        assert server.end() == 0
        server.check_log()
