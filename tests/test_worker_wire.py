"""Messages between the server and a model's process: exact, bounded, and never executed."""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.pipeline import Pipeline
from engine.planner import DenoisingTask
from engine.requests import GenerationRequest
from engine.worker import wire as worker_wire
from engine.worker.task_wire import task_from_message, task_to_message
from engine.worker.wire import Message, WireError, receive, send
from tests.fakes import FakeDenoiser, make_pipeline

Pair = tuple[socket.socket, socket.socket]
TIMEOUT_S = 10.0


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return make_pipeline(FakeDenoiser())


def crossed(task: DenoisingTask, pair: Pair) -> DenoisingTask:
    send(pair[0], task_to_message(task))
    return task_from_message(receive(pair[1], timeout_s=TIMEOUT_S))


def test_a_task_crosses_bit_for_bit(pipeline: Pipeline, pair: Pair) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    request = GenerationRequest(
        prompt="a (red:1.3) cat " * 9,
        negative_prompt="blurry",
        seed=2**64 - 1,
        num_images=3,
        num_inference_steps=7,
        guidance_scale=1.0 / 3.0,
        init_image=picture,
        strength=0.7,
    )
    task = pipeline.plan(request).task
    there = crossed(task, pair)
    assert there.trajectory == task.trajectory and there.weights == task.weights
    assert there.seeds == task.seeds == (2**64 - 1, 0, 1)
    assert there.init_image is not None and np.array_equal(there.init_image, picture)
    assert len(there.texts) == 1 and len(there.texts[0]) == 2
    for ours, theirs in zip(task.texts[0], there.texts[0], strict=True):
        for name in ("inputs_embeds", "eos_index", "weights"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), name


def test_no_word_of_a_prompt_crosses(pipeline: Pipeline) -> None:
    message = task_to_message(pipeline.plan(GenerationRequest(prompt="a secret cat")).task)
    assert "secret" not in json.dumps(message.body)


def test_what_is_no_number_stays_so(pair: Pair) -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    send(pair[0], Message({"value": 0.1}, [values]))
    message = receive(pair[1], timeout_s=TIMEOUT_S)
    assert message.arrays[0].tobytes() == values.tobytes() and message.body == {"value": 0.1}


def test_an_array_of_another_kind_is_not_sent(pair: Pair) -> None:
    for array in (np.array(["a"]), np.array([object()]), np.zeros(2, ">f4")):
        with pytest.raises(WireError, match="cannot be sent"):
            send(pair[0], Message({}, [array]))


def frame(head: bytes, content: bytes = b"", **changes: Any) -> bytes:
    fields = {"magic": b"1Wm\x01", "header": len(head), "arrays": len(content), **changes}
    return struct.pack("<4sIQ", *fields.values()) + head + content


def header(*specs: Any, body: Any = None) -> bytes:
    return json.dumps({"body": {} if body is None else body, "arrays": specs}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (frame(header(), magic=b"\x80\x04\x95\x00"), "begins with"),
        (frame(header(), header=2**32 - 1), "the limit is 1048576"),
        (frame(header(), arrays=2**63), "the limit is 1073741824"),
        (frame(b"\xff\xfe"), "cannot be read"),
        (frame(b"[" * 100_000), "cannot be read"),
        (frame(b"[]"), "cannot be read"),
        (frame(header(body=[])), "not an object"),
        (frame(header(["|O", [1]]), bytes(8)), "cannot be read"),
        (frame(header(["<f4", [2]]), bytes(4)), "cannot be read"),
        (frame(header(["<f4", [1]]), bytes(8)), "its header says 4"),
        (frame(header(["<f4", [-1]]), bytes(4)), "not possible"),
        (frame(header(["<f4", [2**62, 2**62]]), bytes(4)), "cannot be read"),
        (frame(header(["<f4", ["1"]]), bytes(4)), "not possible"),
    ],
    ids=[
        *("magic", "header size", "arrays size", "not UTF-8", "too deep", "no object"),
        *("no body", "objects", "too few bytes", "too many bytes", "negative", "overflow"),
        "a word for a number",
    ],
)
def test_what_is_no_message_is_an_error(pair: Pair, content: bytes, message: str) -> None:
    pair[0].sendall(content)
    with pytest.raises(WireError, match=message):
        receive(pair[1], timeout_s=TIMEOUT_S)


def test_the_end_of_the_other_side_is_known_at_any_byte(pair: Pair) -> None:
    content = frame(header(["<f4", [2]]), bytes(8))
    for length in (0, 7, 20, len(content) - 1):
        ours, theirs = socket.socketpair()
        with theirs:
            with ours:
                ours.sendall(content[:length])
            with pytest.raises(EOFError):
                receive(theirs, timeout_s=TIMEOUT_S)


def test_nobody_waits_for_ever(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair[0].sendall(frame(header())[:-1])
    with pytest.raises(TimeoutError):
        receive(pair[1], timeout_s=0.01)
    large = Message({}, [np.zeros(1 << 22, np.float32)])  # more than a socket holds
    with pytest.raises(TimeoutError):
        send(pair[0], large, timeout_s=0.01)
    monkeypatch.setattr(worker_wire, "MAX_ARRAYS_BYTES", 1 << 20)
    with pytest.raises(WireError, match="limit"):
        send(pair[0], large)


@pytest.mark.parametrize("change", ["seed", "rows_of_encoders", "init_sigma"])
def test_a_task_that_lacks_something_is_an_error(pipeline: Pipeline, change: str) -> None:
    message = task_to_message(pipeline.plan(GenerationRequest(prompt="a cat")).task)
    del message.body[change]
    with pytest.raises(WireError, match="a task cannot be read"):
        task_from_message(message)


def test_a_task_with_other_arrays_is_an_error(pipeline: Pipeline) -> None:
    message = task_to_message(pipeline.plan(GenerationRequest(prompt="a cat")).task)
    with pytest.raises(WireError, match="a task cannot be read"):
        task_from_message(Message(message.body, message.arrays[:-1]))
    with pytest.raises(WireError, match="1 arrays too many"):
        task_from_message(Message(message.body, [*message.arrays, message.arrays[0]]))
