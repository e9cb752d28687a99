"""`oneword jobs` and `oneword generate` against a server that does as it is told."""

from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from oneword.cli import main
from protos.oneword.v1 import generation_pb2
from protos.oneword.v1.generation_pb2 import (
    GenerateRequest,
    GetJobResponse,
    ImageResult,
    SubmitJobResponse,
)
from tests.client_setup import answer, draw, fail, job
from tests.test_client_jobs import AFTER, QUEUED, RUNNING, SUCCEEDED, told
from tests.test_client_retries import Serve
from tests.test_client_retries import serve as serve

SUBMITTED = answer(SubmitJobResponse(job=job(QUEUED)))
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER", "TOKEN", "CA", "TLS"):
        monkeypatch.delenv(f"ONEWORD_{name}", raising=False)


async def test_a_job_is_submitted_and_watched(
    serve: Serve, tmp_path: Path, capsys: Printed
) -> None:
    server = serve(SubmitJob=[SUBMITTED], WatchJob=[answer(*AFTER)])
    at = ("--server", server.address)
    flags = ("--seed", "7", "--num-images", "2", "--priority", "3", "--request-id", "r")
    assert main(["jobs", "submit", "a <cat>", *flags, *at]) == 0
    number, follow = capsys.readouterr().out.splitlines()
    assert (number, follow) == ("job j", f"oneword jobs watch j --server {server.address}")
    (request,) = server.requests("SubmitJob")
    asked = request.request
    assert (asked.prompt, asked.seed, asked.num_images) == ("a <cat>", 7, 2)
    assert (asked.priority, asked.request_id) == (3, "r")
    assert main([*follow.split()[1:], "--output", str(tmp_path / "x.png")]) == 0
    assert [(tmp_path / f"x-{index}.png").read_bytes() for index in range(2)] == [
        b"image 0",
        b"image 1",
    ]


async def test_submitting_with_an_output_waits(
    serve: Serve, tmp_path: Path, capsys: Printed
) -> None:
    server = serve(SubmitJob=[SUBMITTED], WatchJob=[answer(*told(0, job(SUCCEEDED, 1)))])
    output = tmp_path / "x.webp"
    words = ["jobs", "submit", "a", "--output", str(output), "--server", server.address]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == ["job j", str(output)]
    assert output.read_bytes() == b"image 0"
    (request,) = server.requests("SubmitJob")
    assert request.request.image_format == generation_pb2.IMAGE_FORMAT_WEBP


async def test_a_job_that_failed_is_one_line_and_leaves_its_images(
    serve: Serve, tmp_path: Path, capsys: Printed
) -> None:
    failure = generation_pb2.Failure(code=9, message="it is \x1b[31mNaN")
    failed = job(generation_pb2.JOB_STATE_FAILED, 1, failure=failure)
    server = serve(WatchJob=[answer(*told(0, failed))])
    words = ["jobs", "watch", "j", "--output", str(tmp_path / "x.png"), "--server", server.address]
    assert main(words) == 1
    assert capsys.readouterr().err == "oneword: job j is failed: it is \\x1b[31mNaN\n"
    assert (tmp_path / "x.png").read_bytes() == b"image 0"


async def test_a_server_that_is_gone_leaves_word_how_to_go_on(
    serve: Serve, capsys: Printed
) -> None:
    server = serve()
    server.stop()
    assert main(["jobs", "watch", "j", "--server", server.address]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"goes on; watch it: oneword jobs watch j --server {server.address};" in line


async def test_the_images_of_a_job_that_runs(serve: Serve, tmp_path: Path, capsys: Printed) -> None:
    described = GetJobResponse(job=job(RUNNING, 1), images=[ImageResult(image=b"so far")])
    server = serve(GetJob=[answer(described)])
    words = ["jobs", "get", "j", "--output", str(tmp_path / "x.png"), "--server", server.address]
    assert main(words) == 0
    assert (tmp_path / "x.png").read_bytes() == b"so far"
    server.script["GetJob"] = [answer(GetJobResponse(job=job(QUEUED)))]
    assert main(words) == 1
    assert "job j is queued, without images" in capsys.readouterr().err


async def test_jobs_are_listed_cancelled_and_deleted(serve: Serve, capsys: Printed) -> None:
    listed = job(
        RUNNING,
        1,
        request=GenerateRequest(prompt="a \x1b[2J cat", num_images=3),
        create_time=Timestamp(seconds=1),
    )
    server = serve(
        ListJobs=[answer(generation_pb2.ListJobsResponse(jobs=[listed]))],
        CancelJob=[answer(generation_pb2.CancelJobResponse(job=job(RUNNING)))],
        DeleteJob=[answer(generation_pb2.DeleteJobResponse())],
    )
    for words in (["list"], ["cancel", "j"], ["delete", "j"]):
        assert main(["jobs", *words, "--server", server.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("j running      1/3 19") and lines[0].endswith(r"a \x1b[2J cat")
    assert lines[1:] == ["j running", "j deleted"]


async def test_what_cannot_be_asked_for_is_one_line(
    serve: Serve, tmp_path: Path, capsys: Printed
) -> None:
    server = serve(SubmitJob=[fail(StatusCode.INVALID_ARGUMENT, "width must be even")])
    at = ["--server", server.address]
    for words, message in (
        (["submit", "a", "--priority", "-1"], "priority"),
        (["submit", "a", "--output", "x.gif"], "must end in .png or .webp"),
        (["submit", "a"], "width must be even"),
        (["watch", "j", "--output", str(tmp_path)], "is a folder"),
    ):
        assert main(["jobs", *words, *at]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("oneword: ") and message in line


async def test_generate_asks_the_server_of_the_environment(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    server, other = serve(Generate=[fail(StatusCode.UNAVAILABLE), draw]), serve(Generate=[draw])
    words = ["generate", "a cat", "--output", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit):
        main(words)
    assert "--server --bundle" in capsys.readouterr().err
    monkeypatch.setenv("ONEWORD_SERVER", server.address)
    assert main(words) == 0
    assert len(server.requests("Generate")) == 2, "repeated after a failure"
    assert main([*words, "--server", other.address]) == 0
    assert (len(server.requests("Generate")), len(other.requests("Generate"))) == (2, 1)
