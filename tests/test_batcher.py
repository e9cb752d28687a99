"""The batcher on a model that is arithmetic: what shares a call, who leaves, what errors do."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from engine.batching.batcher import (
    Batcher,
    BatcherConfig,
    Event,
    Failed,
    Finished,
    ImageDone,
    StepDone,
    generate,
)
from engine.batching.result_cache import ResultCache
from engine.batching.step_costs import CostTable
from engine.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    NumericalError,
    QueueFull,
    ShuttingDown,
)
from engine.noise import TorchGenerator
from engine.pipeline import ImageInFlight
from engine.planner import GenerationPlan
from engine.requests import RgbImage
from tests.batcher_toy import plan

WAIT_S = 10.0
# A device where a call costs next to nothing, however many share it: so all that can share do.
FLAT = CostTable.of({(64, 1): 1e-3, (64, 2): 1e-3}, {(64, 1): 1e-3, (64, 2): 1e-3}, learns=False)


class FakeModel:
    """Adds 1 to the latents at every step; a gate lets a test hold a step."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []  # seeds in each call
        self.gate = threading.Event()
        self.gate.set()
        self.in_step = threading.Event()
        self.fail_seed: int | None = None
        self.nan_seed: int | None = None

    def begin(self, plan: GenerationPlan) -> list[ImageInFlight]:
        if plan.request.prompt == "bad":
            raise InvalidRequest("bad prompt")
        return [self._image(plan, index) for index in range(plan.request.num_images)]

    def _image(self, plan: GenerationPlan, index: int) -> ImageInFlight:
        seed = plan.request.seed + index
        return ImageInFlight(
            seed=seed,
            trajectory=plan.trajectory,
            prompt_embeds=np.zeros((len(plan.weights), 4, 2), np.float32),
            weights=np.array(plan.weights, np.float32),
            generator=TorchGenerator(seed),
            latents=np.full((1, plan.height, plan.width), seed, np.float32),
        )

    def hold(self) -> None:
        pass

    def step(self, images: Sequence[ImageInFlight], *, at_most: int = 1) -> None:
        assert len({image.shape_key for image in images}) == 1
        self.calls.append([image.seed for image in images])
        self.in_step.set()
        assert self.gate.wait(WAIT_S)
        for image in images:
            if image.seed == self.fail_seed:
                raise RuntimeError("device lost")
            image.latents = image.latents + (np.nan if image.seed == self.nan_seed else 1.0)
            image.steps_done += 1

    def decode(self, images: Sequence[ImageInFlight]) -> list[RgbImage | NumericalError]:
        values = [image.latents[0, 0, 0] for image in images]
        return [
            NumericalError("not finite")
            if np.isnan(value)
            else np.full((2, 2, 3), int(value) % 256, np.uint8)
            for value in values
        ]

    def release(self, images: Sequence[ImageInFlight]) -> None:
        pass

    def wait_ready(self, timeout_s: float) -> bool:
        return True

    def row_cost(self, image: ImageInFlight) -> float:
        return max(1.0, (image.latents.size / 64) ** 2)

    def preview(self, image: ImageInFlight) -> RgbImage | None:
        return np.full((1, 1, 3), image.steps_done, np.uint8)


class Listener:
    """Collects the events of one request and knows when the last one has come."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.closed.set()

    def last(self) -> Event:
        assert self.closed.wait(WAIT_S), "the request never ended"
        return self.events[-1]

    def error(self) -> Exception:
        last = self.last()
        assert isinstance(last, Failed)
        return last.error


Open = Callable[..., Batcher]


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def open_batcher(model: FakeModel) -> Iterator[Open]:
    opened: list[Batcher] = []

    def open_one(**config: int) -> Batcher:
        opened.append(Batcher(model, BatcherConfig(**config), costs=FLAT))
        return opened[-1]

    yield open_one
    model.gate.set()
    for batcher in opened:
        batcher.close()


def test_a_request_ends_with_its_images_in_order(open_batcher: Open) -> None:
    images, timings = generate(open_batcher(), plan(5, seed=10, num_images=3))
    assert [(image.image_index, image.seed) for image in images] == [(0, 10), (1, 11), (2, 12)]
    assert [int(image.image[0, 0, 0]) for image in images] == [15, 16, 17]
    assert timings.denoiser_calls == 5


def test_every_step_is_told_and_previews_come_when_due(open_batcher: Open) -> None:
    listener = Listener()
    open_batcher().submit(plan(5, preview_every=2), listener)
    listener.last()
    steps = [event for event in listener.events if isinstance(event, StepDone)]
    assert [(s.step, s.num_steps) for s in steps] == [(n, 5) for n in range(1, 6)]
    assert [s.step for s in steps if s.preview is not None] == [2, 4]


def test_a_newcomer_joins_at_the_next_step(open_batcher: Open, model: FakeModel) -> None:
    batcher, first, second = open_batcher(), Listener(), Listener()
    model.gate.clear()
    batcher.submit(plan(6, seed=1), first)
    assert model.in_step.wait(WAIT_S)
    batcher.submit(plan(2, seed=2), second)  # while the first is inside its first step
    model.gate.set()
    first.last()
    second.last()
    assert model.calls == [[1], [1, 2], [1, 2], [1], [1], [1]]


def test_images_of_different_shapes_never_share_a_call(
    open_batcher: Open, model: FakeModel
) -> None:
    batcher, listeners = open_batcher(), [Listener(), Listener()]
    model.gate.clear()
    batcher.submit(plan(2, seed=1, side=8), listeners[0])
    batcher.submit(plan(2, seed=2, side=16), listeners[1])
    model.gate.set()
    for listener in listeners:
        assert isinstance(listener.last(), Finished)


def test_a_call_takes_no_more_rows_than_allowed(open_batcher: Open, model: FakeModel) -> None:
    generate(open_batcher(max_batch_rows=4), plan(2, num_images=5, rows=2))
    assert max(len(call) for call in model.calls) == 2


def test_large_images_take_more_room_in_a_call(open_batcher: Open, model: FakeModel) -> None:
    # Twice the side is four times the area, and 16 times the memory of attention.
    generate(open_batcher(max_batch_rows=16), plan(2, num_images=3, rows=1, side=16))
    assert {len(call) for call in model.calls} == {1}
    model.calls.clear()
    generate(open_batcher(max_batch_rows=32), plan(2, num_images=3, rows=1, side=16))
    assert max(len(call) for call in model.calls) == 2


def test_slots_are_bounded_and_refilled(open_batcher: Open, model: FakeModel) -> None:
    images, _ = generate(open_batcher(max_images_in_flight=2), plan(2, num_images=5, rows=1))
    assert len(images) == 5
    assert max(len(call) for call in model.calls) == 2


def test_a_cancelled_request_leaves_within_a_step(open_batcher: Open, model: FakeModel) -> None:
    batcher, listener, other = open_batcher(), Listener(), Listener()
    model.gate.clear()
    job = batcher.submit(plan(50, seed=1), listener)
    assert model.in_step.wait(WAIT_S)
    job.cancel()
    batcher.submit(plan(2, seed=2), other)
    model.gate.set()
    assert isinstance(listener.error(), Cancelled)
    assert isinstance(other.last(), Finished)
    assert sum(1 in call for call in model.calls) == 1


def test_a_cancelled_request_leaves_the_queue(open_batcher: Open, model: FakeModel) -> None:
    batcher, running, queued = open_batcher(max_images_in_flight=1), Listener(), Listener()
    model.gate.clear()
    batcher.submit(plan(3, seed=1), running)
    assert model.in_step.wait(WAIT_S)
    batcher.submit(plan(3, seed=2), queued).cancel()
    model.gate.set()
    assert isinstance(queued.error(), Cancelled)
    assert isinstance(running.last(), Finished)
    assert all(2 not in call for call in model.calls)


def test_a_deadline_ends_a_request_at_the_next_step(open_batcher: Open, model: FakeModel) -> None:
    listener = Listener()
    model.gate.clear()
    batcher = open_batcher()
    batcher.submit(plan(50, seed=1), listener, deadline=time.monotonic() + 0.05)
    assert model.in_step.wait(WAIT_S)
    while time.monotonic() < batcher._slots[0].job.deadline:  # type: ignore[operator]
        threading.Event().wait(0.01)
    model.gate.set()
    assert isinstance(listener.error(), DeadlineExceeded)
    assert len(model.calls) == 1


def test_a_deadline_in_the_past_is_refused_at_once(open_batcher: Open) -> None:
    with pytest.raises(DeadlineExceeded):
        open_batcher().submit(plan(), Listener(), deadline=time.monotonic() - 1)


def test_a_full_queue_refuses_and_says_when_to_come_back(
    open_batcher: Open, model: FakeModel
) -> None:
    batcher = open_batcher(max_images_in_flight=1, max_queued_images=2)
    model.gate.clear()
    listeners = [Listener() for _ in range(3)]
    batcher.submit(plan(2, seed=0), listeners[0])
    assert model.in_step.wait(WAIT_S)
    for listener in listeners[1:]:
        batcher.submit(plan(2, seed=1), listener)
    with pytest.raises(QueueFull, match="limit of 2") as refusal:
        batcher.submit(plan(2, seed=3), Listener())
    assert refusal.value.retry_after_s > 0
    model.gate.set()
    assert all(isinstance(listener.last(), Finished) for listener in listeners)


def test_queue_position_counts_the_images_ahead(open_batcher: Open, model: FakeModel) -> None:
    batcher = open_batcher(max_images_in_flight=1)
    model.gate.clear()
    batcher.submit(plan(2), Listener())
    assert model.in_step.wait(WAIT_S)
    assert batcher.submit(plan(2, num_images=3), Listener()).queue_position == 0
    assert batcher.submit(plan(2), Listener()).queue_position == 3
    assert batcher.load == (1, 4)


def test_a_failing_call_takes_only_its_own_requests(open_batcher: Open, model: FakeModel) -> None:
    batcher, bad, good = open_batcher(), Listener(), Listener()
    model.fail_seed = 1
    model.gate.clear()
    batcher.submit(plan(3, seed=1, side=8), bad)
    batcher.submit(plan(3, seed=2, side=16), good)
    model.gate.set()
    assert isinstance(bad.error(), RuntimeError)
    assert isinstance(good.last(), Finished)


def test_a_request_that_cannot_begin_fails_alone(open_batcher: Open) -> None:
    batcher, bad = open_batcher(), Listener()
    batcher.submit(plan(prompt="bad"), bad)
    assert isinstance(bad.error(), InvalidRequest)
    assert len(generate(batcher, plan(2))[0]) == 1


def test_nan_is_an_error_and_not_a_black_image(open_batcher: Open, model: FakeModel) -> None:
    batcher, bad, good = open_batcher(), Listener(), Listener()
    model.nan_seed = 1
    model.gate.clear()
    batcher.submit(plan(2, seed=1), bad)
    batcher.submit(plan(2, seed=2), good)
    model.gate.set()
    assert isinstance(bad.error(), NumericalError)
    assert isinstance(good.last(), Finished)


def test_a_listener_that_fails_does_not_stop_the_others(open_batcher: Open) -> None:
    batcher = open_batcher()

    def broken(_event: Event) -> None:
        raise OSError("the stream is gone")

    batcher.submit(plan(3), broken)
    assert len(generate(batcher, plan(2))[0]) == 1


def test_closing_finishes_what_runs_and_refuses_what_comes(
    open_batcher: Open, model: FakeModel
) -> None:
    batcher, listener = open_batcher(), Listener()
    model.gate.clear()
    batcher.submit(plan(3, num_images=2), listener)
    assert model.in_step.wait(WAIT_S)
    closing = threading.Thread(target=batcher.close, args=(WAIT_S,))
    closing.start()
    while batcher._accepting:
        threading.Event().wait(0.01)
    with pytest.raises(ShuttingDown):
        batcher.submit(plan(), Listener())
    model.gate.set()
    closing.join(WAIT_S)
    assert isinstance(listener.last(), Finished)


def test_closing_without_grace_fails_what_is_left(open_batcher: Open, model: FakeModel) -> None:
    batcher, listener = open_batcher(), Listener()
    model.gate.clear()
    batcher.submit(plan(1000), listener)
    assert model.in_step.wait(WAIT_S)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not batcher._stopping:
        threading.Event().wait(0.01)
    model.gate.set()
    closing.join(WAIT_S)
    assert isinstance(listener.error(), ShuttingDown)


def test_events_after_the_last_one_are_impossible(open_batcher: Open, model: FakeModel) -> None:
    listener = Listener()
    job = open_batcher().submit(plan(2), listener)
    listener.last()
    job.fail(RuntimeError("late"))
    job.cancel()
    assert sum(isinstance(event, Finished | Failed) for event in listener.events) == 1
    assert sum(isinstance(event, ImageDone) for event in listener.events) == 1


def test_an_equal_request_is_answered_again_only_if_both_may_be(model: FakeModel) -> None:
    results = ResultCache(1 << 20, bundle_identity="b")
    batcher = Batcher(model, costs=FLAT, results=results)
    calls = list[int]()
    for seed, may_reuse in ((1, False), (1, True), (1, True), (1, False)):
        listener = Listener()
        batcher.submit(plan(3, seed=seed), listener, may_reuse=may_reuse)
        assert isinstance(listener.last(), Finished)
        calls.append(len(model.calls))
    batcher.close()
    assert calls == [3, 6, 6, 9]


def test_the_next_free_slot_goes_by_priority(open_batcher: Open, model: FakeModel) -> None:
    batcher = open_batcher(max_images_in_flight=1)
    listeners = [Listener() for _ in range(3)]
    model.gate.clear()
    batcher.submit(plan(1, seed=1), listeners[0])
    assert model.in_step.wait(WAIT_S)
    batcher.submit(plan(1, seed=2), listeners[1], tenant="a")
    batcher.submit(plan(1, seed=3), listeners[2], tenant="b", priority=9)
    model.gate.set()
    assert all(isinstance(listener.last(), Finished) for listener in listeners)
    assert model.calls == [[1], [3], [2]]


def test_configuration_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="max_batch_rows must be at least 1, got 0"):
        BatcherConfig(max_batch_rows=0)
