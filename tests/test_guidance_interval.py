"""Guidance between two shares of the schedule: the calls outside of it are those of guidance 1."""

import argparse
import copy
import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batching.batcher import Batcher, generate
from engine.batching.jobs import Job
from engine.batching.result_cache import ResultCache
from engine.batching.step_costs import CostTable
from engine.errors import InvalidRequest
from engine.guidance import GuidedCalls
from engine.pipeline import ImageInFlight, Pipeline
from engine.requests import GenerationRequest
from engine.sessions import Feeds
from engine.worker.remote_model import RemoteImage
from engine.worker.task_wire import task_from_message, task_to_message
from oneword.generate import add_request_arguments, build_request
from tests.batcher_toy import plan as toy_plan
from tests.fakes import FakeDenoiser, make_pipeline

STEPS = 8
PROMPT = "a photo of a dog"


def begin(pipeline: Pipeline, **fields: Any) -> ImageInFlight:
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": STEPS, **fields}
    (image,) = pipeline.begin(pipeline.plan(GenerationRequest(**asked)))
    return image


def run(pipeline: Pipeline, image: ImageInFlight, num_steps: int) -> np.ndarray:
    for _ in range(num_steps):
        pipeline.step([image])
    return image.latents


def test_the_whole_schedule_is_what_was_drawn_before(pipeline: Pipeline) -> None:
    image = begin(pipeline)
    assert image.guided_calls == GuidedCalls(0, STEPS)
    image.guided_calls = None  # as if there were no such thing
    expected = run(pipeline, image, STEPS)
    whole = begin(pipeline, guidance_start=0.0, guidance_end=1.0)
    np.testing.assert_array_equal(run(pipeline, whole, STEPS), expected)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_a"])
def test_calls_outside_are_those_of_guidance_one_and_those_inside_are_guided(
    pipeline: Pipeline, sampler: str
) -> None:
    """Exactly: one image in a call, the same rows, the same order of operations."""
    found = begin(pipeline, sampler=sampler, guidance_start=0.25, guidance_end=0.75)
    assert found.guided_calls == GuidedCalls(2, 6)
    plain = begin(pipeline, sampler=sampler, guidance_scale=1.0)
    guided = begin(pipeline, sampler=sampler)
    for done in range(STEPS):
        inside = done in GuidedCalls(2, 6)
        image = guided if inside else plain
        image.latents, image.history = found.latents, found.history
        image.generator, image.steps_done = copy.deepcopy(found.generator), done
        assert found.rows == (2 if inside else 1)
        np.testing.assert_array_equal(run(pipeline, found, 1), run(pipeline, image, 1))


def test_an_image_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    """To rounding: a call of more rows may sum in another order (1e-5 of values about 1)."""
    alone = run(pipeline, begin(pipeline, guidance_start=0.3, guidance_end=0.8), STEPS)
    image = begin(pipeline, guidance_start=0.3, guidance_end=0.8)
    mates = [
        begin(pipeline, seed=4),
        begin(pipeline, seed=5, guidance_scale=1.0),
        begin(pipeline, seed=6, guidance_start=0.5, num_inference_steps=2 * STEPS),
    ]
    run(pipeline, mates[2], 7)  # at another step, and then across its own boundary
    for _ in range(STEPS):
        pipeline.step([mates[0], image, *mates[1:]])
    np.testing.assert_allclose(image.latents, alone, atol=2e-4)
    assert np.abs(run(pipeline, begin(pipeline), STEPS) - alone).max() > 0.05


class CountingDenoiser(FakeDenoiser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        assert len({len(array) for array in feeds.values()}) == 1
        self.rows.append(len(feeds["latents"]))
        return super().run(feeds)


def test_rows_are_not_computed_where_there_is_no_guidance() -> None:
    denoiser = CountingDenoiser()
    pipeline = make_pipeline(denoiser)
    batcher = Batcher(pipeline)
    request = GenerationRequest(
        prompt="a cat", num_inference_steps=8, guidance_start=0.25, guidance_end=0.5
    )
    _, timings = generate(batcher, pipeline.plan(request))
    batcher.close()
    assert denoiser.rows == [1, 1, 2, 2, 1, 1, 1, 1]
    assert timings.mean_batch_rows == 10 / 8


def test_the_cost_table_learns_the_rows_that_a_call_had() -> None:
    class Costs(CostTable):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            observe = self.steps.observe

            def note(area: int, count: int, ms: float) -> None:
                self.seen.append(count)
                observe(area, count, ms)

            self.steps.observe = note

    costs = Costs()
    pipeline = make_pipeline(FakeDenoiser())
    batcher = Batcher(pipeline, costs=costs)
    request = GenerationRequest(prompt="a cat", num_inference_steps=4, guidance_end=0.5)
    generate(batcher, pipeline.plan(request))
    batcher.close()
    assert costs.seen == [2, 2, 1, 1]


def test_the_cost_of_an_image_counts_single_rows() -> None:
    table = CostTable.of({(64, 1): 3.0, (64, 2): 5.0}, {(64, 1): 7.0})
    image = {"area": 64, "rows": 2, "num_steps": 10}
    assert table.alone_ms(**image) == 10 * 5 + 7
    assert table.alone_ms(**image, num_single=4) == 6 * 5 + 4 * 3 + 7
    assert table.image_us(**image, num_single=4) == 1000 * (16 * 2.5 + 7)


def test_what_is_left_of_an_image_counts_its_own_calls() -> None:
    plan = dataclasses.replace(toy_plan(steps=8), guided=GuidedCalls(2, 6))
    job = Job(plan=plan, on_event=lambda _event: None, tenant="t")
    single = [job.costs_of(left)["num_single"] for left in range(8, -1, -1)]
    assert single == [4, 3, 2, 2, 2, 2, 2, 1, 0]


def test_images_of_another_interval_are_other_images() -> None:
    pipeline = make_pipeline(FakeDenoiser())
    cache = ResultCache(1 << 20, bundle_identity="b")

    def key(**fields: Any) -> tuple[bytes, ...]:
        request = GenerationRequest(prompt="a cat", num_inference_steps=8, **fields)
        return cache.keys(pipeline.plan(request), "t")

    keys = [key(), key(guidance_end=0.5), key(guidance_start=0.5), key(guidance_start=0.25)]
    assert len({*keys}) == len(keys)
    assert key(guidance_start=0.25) == key(guidance_start=0.26)  # the same calls, the same image


def test_the_interval_crosses_to_the_process_of_the_model() -> None:
    pipeline = make_pipeline(FakeDenoiser())
    request = GenerationRequest(prompt="a cat", num_inference_steps=8, guidance_end=0.5)
    task = task_from_message(task_to_message(pipeline.plan(request).task))
    assert task.guided_calls == GuidedCalls(0, 4)
    image = RemoteImage(
        image_id=1,
        epoch=0,
        seed=0,
        all_rows=2,
        guided_calls=task.guided_calls,
        num_steps=8,
        shape_key=(),
        row_cost=1.0,
        abandoned=deque(),
    )
    rows: list[int] = []
    for done in range(9):
        image.steps_done = done
        rows.append(image.rows)
    assert rows == [2, 2, 2, 2, 1, 1, 1, 1, 2]  # done: all, as the decoder's share is counted


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"guidance_start": -0.1}, "0 <= start < end <= 1, got -0.1 and 1"),
        ({"guidance_end": 1.1}, "got 0 and 1.1"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_scale 1 turns guidance off"),
        ({"guidance_start": 0.8, "guidance_end": 0.2}, "got 0.8 and 0.2"),
        ({"guidance_start": float("nan")}, "got nan and 1"),
        ({"guidance_end": float("nan")}, "got 0 and nan"),
        ({"guidance_end": 0.5, "guidance_scale": 1.0}, "no guidance to limit to 0 to 0.5"),
        ({"guidance_start": 0.5, "guidance_end": 0.51}, "none of the 8 denoiser calls lies"),
    ],
)
def test_intervals_that_cannot_be(fields: dict[str, Any], reason: str) -> None:
    pipeline = make_pipeline(FakeDenoiser())
    with pytest.raises(InvalidRequest, match=reason) as caught:
        pipeline.plan(GenerationRequest(prompt="a cat", num_inference_steps=8, **fields))
    assert caught.value.field == "guidance_start"


shares = st.floats(0.0, 1.0)


@given(st.lists(shares, min_size=3, max_size=3).map(sorted), st.integers(1, 200))
def test_intervals_that_meet_share_no_call_and_miss_none(
    bounds: Sequence[float], num_calls: int
) -> None:
    low, middle, high = bounds
    parts = [GuidedCalls.between(*pair, num_calls) for pair in ((low, middle), (middle, high))]
    whole = GuidedCalls.between(low, high, num_calls)
    assert [i in parts[0] or i in parts[1] for i in range(num_calls)] == [
        i in whole for i in range(num_calls)
    ]
    assert not any(i in parts[0] and i in parts[1] for i in range(num_calls))
    assert sum(part.num_left(0) for part in parts) == whole.num_left(0)
    assert GuidedCalls.between(0.0, 1.0, num_calls) == GuidedCalls(0, num_calls)


def test_the_flag_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    add_request_arguments(parser)
    request = build_request(parser.parse_args(["a", "--guidance-interval", "0.1:0.7"]), "png")
    assert (request.guidance_start, request.guidance_end) == (0.1, 0.7)
    request = build_request(parser.parse_args(["a"]), "png")
    assert not request.HasField("guidance_start") and not request.HasField("guidance_end")
    for text in ("0.1", "a:b", ":", "0.1:"):
        with pytest.raises(SystemExit):
            parser.parse_args(["a", "--guidance-interval", text])
