"""`kill -9` of a whole server, and SIGTERM with more requests than the grace allows."""

import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from engine.concepts import concept_from_bytes
from protos.oneword.v1 import generation_pb2 as pb
from tests.faults.process import (
    CONFIG,
    Refusal,
    RunningServer,
    concept_file,
    outcome_of,
    running,
    until,
)

# More images than are in flight at once, so that some are kept while others are not begun.
JOB: dict[str, Any] = {"num_images": 12, "num_inference_steps": 6}
NUM_NAMES = 3


class Publisher(threading.Thread):
    """Publishes new versions of some names, one after another, until the server is gone."""

    def __init__(self, server: RunningServer, first: int) -> None:
        super().__init__()
        self._server = server
        self.acknowledged = first - 1  # the last value that was
        self.refused: Refusal | None = None

    def run(self) -> None:
        while self.refused is None:
            value = self.acknowledged + 1
            outcome = outcome_of(lambda value=value: publish(self._server, value))
            if isinstance(outcome, Refusal):
                self.refused = outcome
            else:
                self.acknowledged = value


def publish(server: RunningServer, value: int) -> None:
    server.publish(f"<c{value % NUM_NAMES}>", 0.001 * value, overwrite=True)


def concept_id(value: int) -> str:
    content = concept_file(f"<c{value % NUM_NAMES}>", 0.001 * value)
    return concept_from_bytes(content, source="this test").concept_id


def check_published(server: RunningServer, acknowledged: int) -> None:
    """Each name has its last acknowledged version, or the one that was on its way."""
    for token in server.concepts():
        values = [v for v in range(acknowledged + 2) if f"<c{v % NUM_NAMES}>" == token]
        known = [v for v in values if v <= acknowledged]
        wanted = {concept_id(value) for value in (*known[-1:], *values[-1:])}
        assert server.concept_id(token) in wanted, token
        server.export(token)  # its file is whole
    assert len(server.concepts()) >= min(acknowledged + 1, NUM_NAMES)


@pytest.mark.parametrize(
    ("seed", "moments"),
    [
        (1, ("steps_done", "num_images_done")),
        pytest.param(2, ("num_images_done", "steps_done"), marks=pytest.mark.slow),
        pytest.param(3, ("steps_done", "steps_done"), marks=pytest.mark.slow),
        pytest.param(4, ("num_images_done", "num_images_done"), marks=pytest.mark.slow),
    ],
)
def test_what_was_acknowledged_survives_kills_of_the_server(
    emoji_bundle_path: Path, tmp_path: Path, seed: int, moments: tuple[str, ...]
) -> None:
    """Each time in the middle of a publish, of a job and of requests; a job survives two."""
    chance = random.Random(seed)
    acknowledged, job_id, pictures = -1, "", list[bytes]()
    for moment in moments:
        with running(emoji_bundle_path, tmp_path / "store", tmp_path / "log") as server:
            check_published(server, acknowledged)
            pictures = pictures or server.draw(**JOB)
            job_id = job_id or server.submit(request_id="job", **JOB).job_id
            before = getattr(server.job(job_id), moment)
            publisher = Publisher(server, acknowledged + 1)
            publisher.start()
            until(lambda: getattr(server.job(job_id), moment) > before, moment)  # noqa: B023
            enough = publisher.acknowledged + chance.randrange(1, 9)
            until(lambda: publisher.acknowledged >= enough, "publishes")  # noqa: B023
            streams = [server.begin(num_images=8, num_inference_steps=50), server.watch(job_id)]
            for stream in streams:
                next(stream)
            for _ in range(chance.randrange(20_000)):
                pass  # somewhere in the next publish
            server.process.send_signal(signal.SIGKILL)
            for stream in streams:
                told = outcome_of(lambda stream=stream: list(stream))
                assert isinstance(told, Refusal) and told.code is StatusCode.UNAVAILABLE, told
            publisher.join()
            assert publisher.refused and publisher.refused.code is StatusCode.UNAVAILABLE
            acknowledged = publisher.acknowledged
    with running(emoji_bundle_path, tmp_path / "store", tmp_path / "log") as server:
        check_published(server, acknowledged)
        assert server.submit(request_id="job", **JOB).job_id == job_id
        assert server.images_of_job(job_id) == pictures
        publish(server, acknowledged + 1)
        check_published(server, acknowledged + 1)
        assert server.end() == 0
        server.check_log()


def test_fifty_requests_end_before_the_grace_does(emoji_bundle_path: Path, tmp_path: Path) -> None:
    """Some are done in time; the others are told that they are not; the process ends well."""
    config = CONFIG.replace("grace_s = 20.0", "grace_s = 4.0")
    with running(emoji_bundle_path, tmp_path / "store", tmp_path / "log", config=config) as server:
        picture = server.draw(num_inference_steps=2)
        calls = [server.begin(num_inference_steps=(2, 100)[place % 2]) for place in range(50)]
        for call in calls:
            assert next(call).HasField("accepted")
        job_id = server.submit(num_images=16, num_inference_steps=50).job_id
        server.process.send_signal(signal.SIGTERM)
        codes: list[StatusCode] = []
        for place, call in enumerate(calls):
            told = outcome_of(lambda call=call: list(call))
            if isinstance(told, Refusal):
                assert told.retry_after_s == 1.0
                codes.append(told.code)
                continue
            images = [event.image.image for event in told if event.HasField("image")]
            assert images == picture or place % 2
            codes.append(StatusCode.OK)
        assert set(codes) <= {StatusCode.OK, StatusCode.UNAVAILABLE}
        assert StatusCode.OK in codes
        assert server.process.wait(60.0) == 0
        server.check_log()
    with running(emoji_bundle_path, tmp_path / "store", tmp_path / "log") as server:
        assert server.job(job_id).state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING)
