"""Uploads that are refused, break off, or meet a limit: nothing of them stays."""

import asyncio
import resource

import pytest
from grpc import StatusCode

from protos.oneword.v1.training_pb2 import CreateTrainingRequest
from tests.training_harness import (
    SUCCEEDED,
    LearningServer,
    Start,
    chunk,
    end,
    nothing_is_left,
    png,
    refusal,
    spec,
)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "first message must be the spec"),
        ([chunk("a", png())], "first message must be the spec"),
        ([spec(), end(0)], "no image was sent"),
        ([spec(), chunk("a", png()), end(2)], "2 images were announced at the end, 1 have come"),
        ([spec(), chunk("a", png())], "the upload broke off"),
        ([spec(), spec()], "must be a chunk of an image or mask"),
        ([spec(), CreateTrainingRequest()], "must be a chunk of an image or mask"),
        ([spec(), chunk("a", b"")], "without data"),
        ([spec(), chunk("", png())], "file_name must have 1 to 255 characters, got 0"),
        ([spec(), chunk("x" * 256, png())], "file_name must have 1 to 255 characters, got 256"),
        (
            [spec(), chunk("a", b"not an image"), end(1)],
            "'a': it is not a PNG or JPEG or WEBP file",
        ),
        ([spec(), chunk("a", b"%!PS-Adobe-3.0 EPSF-3.0\n"), end(1)], "it is not a PNG"),
        ([spec(), chunk("a", png()[:20]), end(1)], "its beginning is damaged"),
        ([spec(), chunk("a", png(), 5)], "goes on at offset 5, but 0 bytes"),
        ([spec(), chunk("a", png()), chunk("a", png(), 7)], "goes on at offset 7"),
        ([spec(), chunk("a", png()), chunk("b", png(1)), chunk("a", png())], "two images are call"),
        ([spec(), *(chunk(str(i), png(i, 16)) for i in range(4))], "more than 3 images"),
        ([spec(), chunk("a", bytes(20_001))], "'a' is larger than 20000 bytes"),
        (
            [spec(), chunk("a", png(side=70)), chunk("b", png(side=75))],
            "upload is larger than 30000",
        ),
    ],
)
async def test_a_bad_upload_is_refused_and_leaves_nothing(
    served: LearningServer, requests: list[CreateTrainingRequest], message: str
) -> None:
    error = await refusal(served.upload(requests))
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert message in (error.details() or "")
    await nothing_is_left(served)


async def test_a_picture_of_too_many_pixels_is_refused_undecoded(
    served: LearningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.training.uploads.MAX_IMAGE_PIXELS", 1599)
    error = await refusal(served.create())
    assert "it is 40 x 40, the limit is 1599 pixels" in (error.details() or "")


async def test_a_caller_that_goes_away_leaves_nothing(served: LearningServer) -> None:
    call = served.stub.CreateTraining()
    await call.write(spec())
    await call.write(chunk("a", png()[:100]))
    while not served.leftovers():
        await asyncio.sleep(0.01)
    call.cancel()
    await nothing_is_left(served)
    await served.create()  # its place is free again


async def test_a_caller_that_sends_nothing_is_dropped(start: Start) -> None:
    served = await start(stall_timeout_s=0.2)
    call = served.stub.CreateTraining()
    await call.write(spec())
    error = await refusal(call)
    assert error.code() == StatusCode.CANCELLED
    assert "nothing was sent for 0.2 s" in (error.details() or "")
    await nothing_is_left(served)


async def test_an_upload_that_takes_too_long_is_dropped(start: Start) -> None:
    served = await start(upload_timeout_s=0.2)
    call = served.stub.CreateTraining()
    await call.write(spec())
    error = await refusal(call)
    assert error.code() == StatusCode.DEADLINE_EXCEEDED
    assert "more than 0.2 s" in (error.details() or "")
    await nothing_is_left(served)


async def test_too_many_uploads_at_once_are_refused(served: LearningServer) -> None:
    calls = [served.stub.CreateTraining() for _ in range(2)]
    for call in calls:
        await call.write(spec())
    while len(served.leftovers()) < 4:  # a folder and its images/ for each
        await asyncio.sleep(0.01)
    error = await refusal(served.create())
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert "2 uploads are under way" in (error.details() or "")
    for call in calls:
        call.cancel()
    await nothing_is_left(served)


async def test_a_full_disk_is_told_and_nothing_half_written_stays(served: LearningServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file beyond 1000 bytes
    try:
        error = await refusal(served.create())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert "disk of the trainings is full" in (error.details() or "")
    await nothing_is_left(served)
    assert (await served.ended((await served.create()).training_id)).state == SUCCEEDED
