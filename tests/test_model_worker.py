"""A model in a process of its own draws what it draws in this one, and keeps nothing."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle
from engine.concepts import Concept
from engine.errors import BundleError, NumericalError, ProviderUnavailable
from engine.pipeline import ImageInFlight, ImageModel, Pipeline, open_sessions
from engine.planner import Planner
from engine.requests import GenerationRequest, Limits
from engine.worker import model_worker
from engine.worker.process import RING, WorkerCommand
from engine.worker.remote_model import RemoteModel, open_remote
from engine.worker.supervisor import WorkerConfig
from engine.worker.task_wire import task_to_message
from engine.worker.wire import Message, WireError, receive, send
from tests import faulty_worker
from tests.worker_harness import (
    WAIT_S,
    draw,
    draw_staggered,
    faulty_model,
    request,
    same,
    wait_for_end,
)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def model(faults: Path, emoji_bundle_path: Path) -> Iterator[RemoteModel]:
    """The embedded model in one process for all tests, which must leave it sound."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faulty_worker.FAULTS, str(faults))
        model = faulty_model(emoji_bundle_path)
        model.launch()
        model.start()
    yield model
    model.close()


def picture(width: int, height: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_process_leaves_the_cores_to_who_is_less_patient(emoji_bundle_path: Path) -> None:
    _, model = open_remote(emoji_bundle_path, config=WorkerConfig(niceness=7))
    assert model.pid is not None
    ours, theirs = os.getpriority(os.PRIO_PROCESS, 0), os.getpriority(os.PRIO_PROCESS, model.pid)
    model.close()
    assert theirs == min(ours + 7, 19)


# The same images


def test_every_picture_and_preview_is_that_of_this_process(
    pipeline: Pipeline, model: RemoteModel
) -> None:
    dim = pipeline.bundle.manifest.text.dim
    vectors = np.random.default_rng(1).normal(0.0, 0.05, (2, dim)).astype(np.float32)
    concept = Concept(placeholder_token="<x>", learned_embeddings=vectors)
    multiple = pipeline.bundle.manifest.latents.size_multiple
    requests = (
        request("a <x>", concepts=(concept,), sampler="euler_a", num_inference_steps=4),
        request("a (red:1.4) dog", negative_prompt="blue", sampler="dpmpp_2m", num_images=2),
        request("", guidance_scale=1.0, sampler="heun", num_inference_steps=2),
        request(
            init_image=picture(50, 70),
            strength=0.6,
            num_inference_steps=5,
            sampler="dpmpp_2m_sde_karras",
        ),
        request("a house " * 20, sampler="pndm", seed=2**64 - 1, num_images=2),
        request(width=3 * multiple, height=2 * multiple, sampler="unipc"),
    )
    plans = [pipeline.plan(one) for one in requests]
    here, there = draw_staggered(pipeline, plans), draw_staggered(model, plans)
    for one, other in zip(here, there, strict=True):
        assert len(one) > 2 and same(one, other)
    assert model.count() == 0


def test_a_handle_says_what_the_image_says(pipeline: Pipeline, model: RemoteModel) -> None:
    plan = pipeline.plan(request(num_images=2, sampler="heun", width=32, height=64))
    here, there = pipeline.begin(plan), model.begin(plan)
    for _ in range(3):
        for one, other in zip(here, there, strict=True):
            for name in ("seed", "rows", "num_steps", "steps_done", "is_done", "shape_key"):
                assert getattr(one, name) == getattr(other, name), name
            assert pipeline.row_cost(one) == model.row_cost(other)
        pipeline.step(here)
        model.step(there)
    model.release(there)


# Steps that are made unasked


def test_several_steps_are_those_that_are_asked_for_one_by_one(
    pipeline: Pipeline, model: RemoteModel
) -> None:
    """Whoever joins or leaves between them."""
    plans = [pipeline.plan(request(seed=seed, num_inference_steps=6)) for seed in (1, 2, 3)]
    (first,), (second,), (third,) = (model.begin(plan) for plan in plans)
    asked = time.monotonic()
    moments = [moment for call in model.step([first], at_most=3) for moment in call]
    assert moments == sorted(moments) and first.steps_done == 3
    assert asked <= moments[0] and moments[-1] <= time.monotonic()
    model.step([first, second], at_most=2)
    model.step([third, first, second])
    model.release([third])
    assert (first.is_done, second.steps_done) == (True, 3)
    model.step([second], at_most=3)
    for image, plan in zip((first, second), plans, strict=False):
        (picture,), (expected,) = model.decode([image]), draw(pipeline, plan)
        assert isinstance(picture, np.ndarray) and isinstance(expected, np.ndarray)
        # Another batch size sums in another order: at most one step of 255.
        assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1
    assert model.count() == 0


@pytest.mark.parametrize("rings", [0, 1, 100_000])
def test_a_process_that_is_told_to_hold_makes_no_other_step(
    emoji_bundle_path: Path, rings: int
) -> None:
    """Told in the middle of a call, as when somebody comes or goes; and more than it can hear."""
    in_step, go_on, calls = threading.Event(), threading.Event(), list[int]()

    class Gated(ImageModel):
        def step(self, images: Sequence[ImageInFlight], *, at_most: int = 1) -> None:
            calls.append(len(images))
            in_step.set()
            assert go_on.wait(WAIT_S)
            super().step(images)

    def load(bundle: Bundle, backend: str) -> ImageModel:
        return Gated(bundle, open_sessions(bundle, "CPUExecutionProvider"))

    planner = Planner(Bundle.open(emoji_bundle_path), limits=Limits())
    task = task_to_message(planner.plan(request(guidance_scale=1.0, num_inference_steps=5)).task)
    (ours, theirs), (bell, heard) = socket.socketpair(), socket.socketpair()
    bell.setblocking(False)
    arguments = (theirs, heard, emoji_bundle_path, "cpu", load)
    thread = threading.Thread(target=model_worker.serve, args=arguments)
    thread.start()

    def ring(times: int) -> None:
        for _ in range(times):
            with suppress(BlockingIOError):
                bell.send(RING)

    with theirs, bell, heard:
        with ours:
            receive(ours)
            ring(rings)  # for what the server knew when it got the next answer
            send(ours, Message({**task.body, "action": "begin", "ids": [7]}, task.arrays))
            assert "error" not in receive(ours).body
            send(ours, Message({"action": "step", "ids": [7], "at_most": 3}))
            assert in_step.wait(WAIT_S)
            ring(rings)
            go_on.set()
            assert len(receive(ours).body["calls"]) == len(calls) == (1 if rings else 3)
            calls.clear()
            send(ours, Message({"action": "step", "ids": [7], "at_most": 1}))
            assert len(receive(ours).body["calls"]) == len(calls) == 1
        thread.join(WAIT_S)


def test_a_step_that_fails_unasked_fails_with_those_before_it(
    pipeline: Pipeline, model: RemoteModel, faults: Path
) -> None:
    images = model.begin(pipeline.plan(request()))
    (faults / "denoiser.raise").write_text("next")
    with pytest.raises(RuntimeError, match="device lost"):
        model.step(images, at_most=2)
    assert not (faults / "denoiser.raise").exists(), "the call that nobody asked for has failed"
    model.release(images)
    assert model.count() == 0


# Nothing is kept


def test_images_that_leave_early_leave_no_trace(pipeline: Pipeline, model: RemoteModel) -> None:
    plan = pipeline.plan(request(num_images=16, guidance_scale=1.0))
    for turn in range(13):
        images = model.begin(plan)
        if turn == 5:
            model.step(images)
        assert model.count() == 16
        model.release(images)
        model.release(images)  # what is free already stays free
        assert model.count() == 0


def test_handles_that_are_dropped_leave_no_trace(pipeline: Pipeline, model: RemoteModel) -> None:
    plan = pipeline.plan(request(num_images=8))
    images = model.begin(plan)
    kept = images.pop()
    del images
    assert model.count() == 1
    model.release([kept])


def test_a_picture_is_decoded_once(pipeline: Pipeline, model: RemoteModel) -> None:
    images = model.begin(pipeline.plan(request(num_images=2)))
    model.decode(images[:1])
    assert model.count() == 1
    with pytest.raises(RuntimeError, match="there is no image"):
        model.decode(images[:1])
    model.release(images)


# Errors are answers


def test_a_picture_that_is_not_finite_is_the_only_one_that_fails(
    pipeline: Pipeline, model: RemoteModel, faults: Path
) -> None:
    plans = [pipeline.plan(request(guidance_scale=1.0, seed=seed)) for seed in (1, 2, 3)]
    alone = [draw(pipeline, plan)[0] for plan in plans]
    for component in ("denoiser", "vae_decoder"):
        images = [model.begin(plan)[0] for plan in plans]
        while not images[0].is_done:
            if images[0].steps_done == 1:
                (faults / f"{component}.nan").write_text("1")
            model.step(images)
        results = model.decode(images)
        assert isinstance(results[1], NumericalError) and "NaN" in str(results[1])
        for index in (0, 2):
            result, expected = results[index], alone[index]
            assert isinstance(result, np.ndarray) and isinstance(expected, np.ndarray)
            # Another batch size sums in another order: at most one step of 255.
            assert np.abs(result.astype(int) - expected.astype(int)).max() <= 1
    assert model.count() == 0


def test_a_call_that_fails_leaves_the_process_and_its_images(
    pipeline: Pipeline, model: RemoteModel, faults: Path
) -> None:
    pid, plan = model.pid, pipeline.plan(request())
    images = model.begin(plan)
    model.step(images)
    (faults / "denoiser.raise").touch()
    with pytest.raises(RuntimeError, match="device lost"):
        model.step(images)
    while not images[0].is_done:
        model.step(images)
    assert same(model.decode(images), draw(pipeline, plan))
    assert model.pid == pid


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("fly", {}),
        ("begin", {}),
        ("begin", {"ids": [1], "seed": "x"}),
        ("step", {}),
        ("step", {"ids": [10**9]}),
        ("step", {"ids": []}),
        ("decode", {"ids": "all"}),
        ("preview", {"id": None}),
        ("release", {"ids": 7}),
    ],
)
def test_a_question_without_sense_is_an_error_and_no_more(
    model: RemoteModel, action: str, body: dict[str, Any]
) -> None:
    pid = model.pid
    with pytest.raises(RuntimeError, match="the model's process failed"):
        model._supervisor.ask(action, Message(body))
    assert (model.pid, model.count()) == (pid, 0)


def test_what_cannot_be_sent_is_an_error_and_no_more(model: RemoteModel) -> None:
    pid = model.pid
    with pytest.raises(WireError, match="cannot be sent"):
        model._supervisor.ask("step", Message({"ids": []}, [np.array(["word"])]))
    assert (model.pid, model.count()) == (pid, 0)


# The start


def refusal_of_start(bundle: Path, backend: str = "cpu") -> Exception:
    model = RemoteModel(WorkerCommand(bundle=bundle, backend=backend))
    model.launch()
    with pytest.raises(Exception) as caught:
        model.start()
    assert model.pid is None and not model.wait_ready(0.0)
    model.close()
    return caught.value


def test_a_start_fails_as_it_fails_in_this_process(emoji_bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as missing:
        Bundle.open(tmp_path)
    found = refusal_of_start(tmp_path)
    assert type(found) is BundleError and str(found) == str(missing.value)
    with pytest.raises(ProviderUnavailable) as unavailable:
        Pipeline.open(emoji_bundle_path, execution_provider="NoExecutionProvider")
    found = refusal_of_start(emoji_bundle_path, "NoExecutionProvider")
    assert type(found) is ProviderUnavailable and str(found) == str(unavailable.value)


# Signals


def test_a_signal_for_the_server_is_not_for_its_model(
    pipeline: Pipeline, model: RemoteModel
) -> None:
    plan, pid = pipeline.plan(GenerationRequest(prompt="a cat", num_inference_steps=2)), model.pid
    assert pid is not None and os.getsid(pid) != os.getsid(0)  # Ctrl-C goes to a session
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert same(draw(model, plan), draw(pipeline, plan))
    assert model.pid == pid


def test_a_model_that_is_closed_ends_its_process(emoji_bundle_path: Path) -> None:
    planner, model = open_remote(emoji_bundle_path)
    pid = model.pid
    assert pid is not None
    images = model.begin(planner.plan(request()))
    model.close()
    model.close()
    wait_for_end(pid)
    model.release(images)
    assert not model.wait_ready(0.0) and not model.state[0]
