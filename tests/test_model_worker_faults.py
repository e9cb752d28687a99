"""A model's process that is killed, hangs or cannot start: noticed, told, and started again."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.batching.batcher import Batcher, BatcherConfig, Event, Finished, ImageDone, StepDone
from engine.bundle import MANIFEST, read_manifest
from engine.errors import ConfigError, WorkerDied
from engine.pipeline import Pipeline
from engine.worker.log import _KEPT_LINES, _LINES_PER_PERIOD, WorkerLog, printable
from engine.worker.remote_model import RemoteModel
from engine.worker.supervisor import Patience, WorkerConfig
from tests import faulty_worker
from tests.conftest import ROOT
from tests.worker_harness import (
    WAIT_S,
    States,
    altered_bundle,
    draw,
    faulty_model,
    request,
    same,
    wait_for_end,
)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(faulty_worker.FAULTS, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the faults of `model` are ordered."""
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def model(orders: Path, emoji_bundle_path: Path) -> Iterator[RemoteModel]:
    """One for the tests that leave it serving."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faulty_worker.FAULTS, str(orders))
        model = faulty_model(emoji_bundle_path)
        model.launch()
        model.start()
        yield model
    model.close()


# Death


def test_requests_in_flight_are_begun_again_and_come_out_the_same(
    pipeline: Pipeline, model: RemoteModel, orders: Path
) -> None:
    plans = [pipeline.plan(request(seed=seed, num_inference_steps=6)) for seed in (1, 2)]
    with_costs = BatcherConfig(cost_measurement_s=0.0)
    expected = [draw(pipeline, plan) for plan in plans]
    batcher = Batcher(model, with_costs)
    pid, steps, done = model.pid, list[int](), [list[ImageDone](), list[ImageDone]()]
    ended = threading.Semaphore(0)

    def listen(place: int, event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)
            if len(steps) == 5:  # in the middle of both
                (orders / "denoiser.kill").touch()
        elif isinstance(event, ImageDone):
            done[place].append(event)
        else:
            assert isinstance(event, Finished), event
            ended.release()

    for place, plan in enumerate(plans):
        batcher.submit(plan, partial(listen, place))
    for _ in plans:
        assert ended.acquire(timeout=WAIT_S)
    batcher.close()
    assert model.pid != pid and len(steps) > 12, "some steps were made twice"
    for pictures, events in zip(expected, done, strict=True):
        assert same(pictures, [event.image for event in events])


def test_a_death_in_any_call_is_told_and_the_next_process_draws_the_same(
    pipeline: Pipeline, model: RemoteModel, orders: Path
) -> None:
    states, plan = States(), pipeline.plan(request(num_images=2, sampler="euler_a"))
    model.watch(states)
    expected = draw(model, plan)
    told = [True]
    for action, component in (
        ("begin", "text_encoder"),
        ("step", "denoiser"),
        ("decode", "vae_decoder"),
    ):
        pid = model.pid
        other = pipeline.plan(request("a text that no cache has", negative_prompt=action))
        (orders / f"{component}.kill").touch()
        with pytest.raises(WorkerDied, match=f"ended during {action}: it ended by SIGKILL"):
            draw(model, other)
        assert model.wait_ready(WAIT_S)
        assert model.pid not in (pid, None)
        assert same(draw(model, plan), expected)
        told += [False, True]
        states.wait_for(*told)
    assert "SIGKILL" in states.told[1][1] and states.told[2][1] == ""


def test_a_death_between_calls_is_told_though_nobody_asks(
    pipeline: Pipeline, model: RemoteModel
) -> None:
    states, plan = States(), pipeline.plan(request())
    model.watch(states)
    images, old = model.begin(plan), model.pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    states.wait_for(True, False, True)
    with pytest.raises(WorkerDied, match="begin it again"):
        model.step(images)
    model.release(images)  # they went with their process
    assert model.count() == 0 and model.pid != old
    assert len(draw(model, plan)) == 1


def test_a_process_that_hangs_is_killed_and_replaced(
    pipeline: Pipeline, model: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pipeline.plan(request())
    expected, images, pid = draw(model, plan), model.begin(plan), model.pid
    assert pid is not None
    # It has learned how long a step takes here, and gives 50 times that on a busy machine.
    monkeypatch.setattr(model._supervisor._patience, "least_s", 1.0)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerDied, match="killed because it did not answer within"):
        model.step(images)
    wait_for_end(pid)
    assert model.wait_ready(WAIT_S)
    assert same(draw(model, plan), expected)


def test_work_that_always_takes_long_is_given_long() -> None:
    patience = Patience(10.0)
    assert patience.limit_s("step", 4.0) == 10.0
    patience.learn("step", 2.0, 6.0)
    assert patience.limit_s("step", 4.0) == 50 * 3.0 * 4.0
    assert patience.limit_s("decode", 4.0) == 10.0
    patience.learn("step", 1.0, 13.0)
    assert patience.limit_s("step", 1.0) == pytest.approx(50 * 4.0)


@pytest.mark.parametrize("name", ["worker_timeout_s", "restart_delay_s"])
def test_times_that_are_none_are_refused_by_name(name: str) -> None:
    times: dict[str, Any] = {name: 0.0}
    with pytest.raises(ConfigError, match=name):
        WorkerConfig(**times)


@pytest.mark.parametrize("niceness", [-1, 20])
def test_a_niceness_that_is_none_is_refused(niceness: int) -> None:
    with pytest.raises(ConfigError, match="niceness must be 0 to 19"):
        WorkerConfig(niceness=niceness)


# Deaths at the start


def test_a_first_start_that_dies_is_an_error_with_its_last_words(
    faults: Path, emoji_bundle_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (faults / "load.exit").touch()
    (faults / "load.say").write_text("no room\nfor weights")
    model = faulty_model(emoji_bundle_path)
    model.launch()
    with pytest.raises(WorkerDied) as caught:
        model.start()
    text = str(caught.value)
    assert "could not load the model" in text and "with exit code 3" in text
    assert "no room | for weights" in text
    for word in ("no room", "for weights"):
        assert any(
            message.startswith("model process ") and message.endswith(f": {word}")
            for message in caplog.messages
        )
    model.close()


def test_a_crash_loop_is_told_in_words_and_ends_when_its_cause_does(
    faults: Path, emoji_bundle_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = States()
    model = faulty_model(emoji_bundle_path, restart_delay_s=0.01, max_restart_delay_s=0.02)
    model.launch()
    model.start()
    try:
        model.watch(states)
        (faults / "load.exit").touch()
        assert model.pid is not None
        os.kill(model.pid, signal.SIGKILL)
        states.wait_for(True, False)
        reason = states.wait_for(True, False, False, False)
        assert "does not start" in reason and "with exit code 3" in reason
        assert not model.state[0] and not model.wait_ready(0.0)
        with pytest.raises(WorkerDied, match="being started again"):
            model.count()
        (faults / "load.exit").unlink()
        assert model.wait_ready(WAIT_S)
        assert model.count() == 0
    finally:
        model.close()
    assert "with exit code 3" in caplog.text


def test_a_restart_that_hangs_is_given_up_when_it_takes_far_longer_than_the_last_start(
    emoji_bundle_path: Path, faults: Path
) -> None:
    """And not when the time of a first start is over, which may be minutes."""
    states, model = States(), faulty_model(emoji_bundle_path, worker_timeout_s=1.0)
    model.launch()
    model.start()
    model.watch(states)
    pid = model.pid
    assert pid is not None
    (faults / "load.hold").touch()
    os.kill(pid, signal.SIGKILL)
    states.wait_for(True, False, False, True)
    assert "it was killed because it did not answer within" in states.told[2][1]
    model.close()


def test_a_bundle_that_changed_is_not_served_by_the_next_process(
    faults: Path, emoji_bundle_path: Path
) -> None:
    bundle, states = altered_bundle(emoji_bundle_path, faults / "bundle", "one"), States()
    model = faulty_model(bundle, restart_delay_s=0.01, max_restart_delay_s=0.02)
    model.launch()
    model.start()
    try:
        model.watch(states)
        original = (bundle / MANIFEST).read_text()
        changed = dataclasses.replace(read_manifest(bundle), model_name="two")
        (bundle / MANIFEST).write_text(changed.to_json())
        assert model.pid is not None
        os.kill(model.pid, signal.SIGKILL)
        states.wait_for(True, False, False)
        assert "was changed while it was in service" in states.told[2][1]
        (bundle / MANIFEST).write_text(original)
        assert model.wait_ready(WAIT_S)
    finally:
        model.close()


# The server's own death

_HOLD_AND_DIE = """
import sys
from pathlib import Path
from tests.worker_harness import faulty_model, request
from engine.bundle import Bundle
from engine.planner import Planner
from engine.requests import Limits

bundle = Path(sys.argv[1])
model = faulty_model(bundle)
model.launch()
model.start()
images = model.begin(Planner(Bundle.open(bundle), limits=Limits()).plan(request()))
print(model.pid, flush=True)
model.step(images)
"""


def test_the_process_dies_with_a_server_that_is_killed(
    faults: Path, emoji_bundle_path: Path
) -> None:
    (faults / "denoiser.hold").touch()
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD_AND_DIE, str(emoji_bundle_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout
        pid = int(server.stdout.readline())
        while not (faults / "denoiser.held").exists():  # until it is in the middle of a step
            assert server.poll() is None
            time.sleep(0.05)
        os.kill(pid, 0)
        server.kill()
    wait_for_end(pid)


# What it writes


def test_a_flood_of_words_is_cut_and_its_end_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reading, writing = os.pipe()
    log = WorkerLog(os.fdopen(reading, "rb"), "model process 7")
    with os.fdopen(writing, "wb") as stream:
        for number in range(2000):
            stream.write(f"line {number}\n".encode())
        stream.write(b"x" * 5000 + b"\n\xff\x1b[2J\n")
    tail = log.tail(wait_s=WAIT_S)
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "model process 7: line 0"
    assert len(told) <= _LINES_PER_PERIOD + 1 and "more lines, left out here" in told[-1]
    assert len(tail) == _KEPT_LINES and tail[-1] == "\ufffd\\x1b[2J"
    assert max(len(line) for line in tail) <= 500


def test_a_line_stays_one_line() -> None:
    assert printable(b"a\rb\tc\x00\xe2\x80\xae\n") == r"a\rb\tc\x00\u202e"
