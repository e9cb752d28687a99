"""A wall clock that jumps by hours, forward and back, under a running server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode

from engine.image_jobs.job import JobLimits
from engine.image_jobs.store import ImageJobStore
from engine.security.credential_edits import create_token
from protos.oneword.v1 import generation_pb2 as pb
from protos.oneword.v1.server_info_pb2 import GetServerInfoRequest
from tests.faults.machine import Machine
from tests.faults.process import WAIT_S, RunningServer, asked, images_of, refusal, running

JUMPS_H = (6.0, -6.0, 0.0)
LONG = {"num_images": 2, "num_inference_steps": 10}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def server(emoji_bundle_path: Path, tmp_path: Path, machine: Machine) -> Iterator[RunningServer]:
    with running(
        emoji_bundle_path, tmp_path / "store", tmp_path / "log", environment=machine.environment
    ) as server:
        yield server
        assert server.end() == 0
        server.check_log()


def test_requests_under_way_neither_end_nor_hang(server: RunningServer, machine: Machine) -> None:
    pictures = server.draw(**LONG)
    first = server.draw(request_id="named")
    for hours in JUMPS_H:
        stream = server.begin(**LONG)
        assert next(stream).HasField("accepted")
        waiting = server.begin(seed=8)
        machine.set_clock(hours)
        assert images_of(stream) == pictures
        assert images_of(waiting) == server.draw(seed=8)
        # A deadline is so many seconds, and not a time of day.
        request = asked(num_images=16, num_inference_steps=100)
        call = server.stubs.generation.Generate(request, timeout=0.5)
        assert refusal(lambda call=call: list(call)).code is StatusCode.DEADLINE_EXCEEDED
        # What was asked for under a name is not drawn twice.
        stream = server.begin(request_id="named")
        assert next(stream).accepted.repeated
        assert images_of(stream) == first
    assert server.stubs.server_info.GetServerInfo(GetServerInfoRequest(), timeout=WAIT_S).serving


def test_jobs_end_and_lists_are_complete(server: RunningServer, machine: Machine) -> None:
    pictures = server.draw(**LONG)
    submitted: list[str] = []
    for hours in JUMPS_H:
        submitted.append(server.submit(request_id=f"{hours}", **LONG).job_id)
        machine.set_clock(hours)  # under way
    for job_id in submitted:
        assert server.images_of_job(job_id) == pictures
    hour = {job_id: server.job(job_id).create_time.seconds for job_id in submitted}
    seen: list[str] = []
    token = ""
    for hours in (*JUMPS_H, 1.0):
        machine.set_clock(hours)  # between one page and the next
        request = pb.ListJobsRequest(page_size=1, page_token=token)
        page = server.stubs.jobs.ListJobs(request, timeout=WAIT_S)
        seen += [job.job_id for job in page.jobs]
        if not (token := page.next_page_token):
            break
    assert seen == sorted(submitted, key=lambda job_id: -hour[job_id])
    assert server.submit(request_id="6.0", **LONG).job_id == submitted[0]
    machine.set_clock(-6.0)
    job = server.submit(seed=1)
    assert server.stubs.jobs.CancelJob(pb.CancelJobRequest(job_id=job.job_id), timeout=WAIT_S)


def test_an_older_job_is_not_overtaken_by_those_from_before_its_time(tmp_path: Path) -> None:
    now = 10_000.0
    store = ImageJobStore(tmp_path, JobLimits(), clock=lambda: now)
    for tenant, name in (("a", "1"), ("b", "2"), ("a", "3"), ("b", "4")):
        store.submit(tenant=tenant, request_id=name, body=b"", shown=b"", pinned=b"", priority=0)
        now -= 3600.0
    begun = [store.begin_next({}) for _ in range(4)]
    assert [found and found[0].request_id for found in begun] == ["1", "2", "3", "4"]
    store.close()


def test_a_quota_is_not_refilled_and_a_token_expires(
    emoji_bundle_path: Path, tmp_path: Path, machine: Machine
) -> None:
    credentials = tmp_path / "credentials.toml"
    credentials.touch(0o600)
    credentials.write_text("[tenants.poor]\nrequests_per_second = 0.001\nburst = 3\n")
    tokens = {
        tenant: create_token(
            credentials, tenant=tenant, name="ci", scopes=("generate",), expires_in_days=0.1
        ).token
        for tenant in ("poor", "rich")
    }
    with running(
        emoji_bundle_path,
        tmp_path / "store",
        tmp_path / "log",
        environment=machine.environment,
        flags=("--credentials", str(credentials)),
        token=tokens["poor"],
    ) as server:
        for _ in range(3):
            server.draw()
        for hours in (2.0, -6.0, 0.0):
            machine.set_clock(hours)
            assert refusal(server.draw).code is StatusCode.RESOURCE_EXHAUSTED
        server.call_as(tokens["rich"])
        pictures = server.draw()
        machine.set_clock(6.0)  # beyond 0.1 days
        assert refusal(server.draw).code is StatusCode.UNAUTHENTICATED
        machine.set_clock(0.0)
        assert server.draw() == pictures
        assert server.end() == 0
