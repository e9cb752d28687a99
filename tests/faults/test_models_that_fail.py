"""A model that gives no numbers, or kills its process, under a running server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode

from engine.client import Client
from engine.client.errors import ServerError
from tests.faults.poison import FOLDER
from tests.faults.process import Refusal, RunningServer, images_of, outcome_of, running

NUM_REQUESTS = 4
ROUNDS = 10  # until calls are shared: what that is worth, the server learns


@pytest.fixture
def server(emoji_bundle_path: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """One that heeds the orders in the folder of its log."""
    with running(
        emoji_bundle_path,
        tmp_path / "store",
        tmp_path / "log",
        module="tests.faults.served",
        environment={FOLDER: str(tmp_path)},
    ) as server:
        yield server
        assert server.end() == 0
        server.check_log()


def test_numbers_that_are_none_fail_the_request_that_they_are_of(server: RunningServer) -> None:
    """One row in the middle of a call that requests share: that one fails, and no bit of the
    others' images is another than it is alone."""
    fields = {"num_inference_steps": 8, "guidance_scale": 1.0}  # a row each
    alone = [server.draw(seed=seed, **fields) for seed in range(NUM_REQUESTS)]
    folder = server.log.parent
    (folder / "poison").write_text(f"{NUM_REQUESTS - 1} 1")
    failed = list[Refusal]()
    for _ in range(ROUNDS):
        streams = [server.begin(seed=seed, **fields) for seed in range(NUM_REQUESTS)]
        outcomes = [outcome_of(lambda stream=stream: images_of(stream)) for stream in streams]
        failed = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
        for outcome, images in zip(outcomes, alone, strict=True):
            assert isinstance(outcome, Refusal) or outcome == images
        if (folder / "poisoned").exists():
            break
    (refused,) = failed
    assert refused.code is StatusCode.FAILED_PRECONDITION
    assert "NaN or infinite" in refused.text
    assert [server.draw(seed=seed, **fields) for seed in range(NUM_REQUESTS)] == alone


def test_a_request_that_kills_the_model_is_not_repeated_by_itself(server: RunningServer) -> None:
    """It was tried three times. Each time more would take the model from all others."""
    pictures = server.draw()
    folder = server.log.parent
    (folder / "deadly").touch()
    with Client(server.address) as client, pytest.raises(ServerError) as caught:
        client.generate(prompt="a red dog", seed=7, num_inference_steps=4)
    assert (caught.value.code, caught.value.reason) == (StatusCode.UNAVAILABLE, "WORKER_DIED")
    assert caught.value.attempts == 1 and not caught.value.transient
    assert len(list(folder.glob("died-*"))) == 3
    (folder / "deadly").unlink()
    assert server.draw() == pictures
