"""The pipeline as the batcher's model: pictures that are errors, and what its calls cost."""

import dataclasses

import numpy as np
import pytest

from engine.batching.batcher import Model
from engine.batching.config import BatcherConfig
from engine.batching.cost_measurement import measure_costs, measuring_plan
from engine.errors import NumericalError
from engine.pipeline import ImageInFlight, Pipeline
from engine.requests import GenerationRequest
from engine.sessions import Feeds
from tests.fakes import FakeDenoiser, FakeVaeDecoder, make_pipeline


@pytest.fixture
def denoiser() -> FakeDenoiser:
    return FakeDenoiser()


@pytest.fixture
def toy_pipeline(denoiser: FakeDenoiser) -> Pipeline:
    return make_pipeline(denoiser)


def begin(pipeline: Pipeline, **fields: int) -> list[ImageInFlight]:
    request = GenerationRequest(prompt="a cat", num_inference_steps=4)
    return pipeline.begin(pipeline.plan(dataclasses.replace(request, **fields)))  # type: ignore[arg-type]


def test_a_pipeline_is_a_model(toy_pipeline: Pipeline) -> None:
    assert isinstance(toy_pipeline, Model)
    assert toy_pipeline.wait_ready(0.0)
    (image,) = begin(toy_pipeline)
    assert (image.rows, image.num_steps, image.steps_done, image.is_done) == (2, 4, 0, False)


def test_latents_that_are_not_finite_are_an_error_for_their_image_alone(
    toy_pipeline: Pipeline,
) -> None:
    images = begin(toy_pipeline, num_images=3)
    alone = toy_pipeline.decode(images[2:])[0]
    images[1].latents = np.full_like(images[1].latents, np.inf)
    first, second, third = toy_pipeline.decode(images)
    assert isinstance(second, NumericalError) and "--precision fp32" in str(second)
    assert isinstance(first, np.ndarray) and isinstance(third, np.ndarray)
    np.testing.assert_array_equal(third, alone)
    assert all(isinstance(p, NumericalError) for p in toy_pipeline.decode(images[1:2]))


def test_a_picture_that_is_not_finite_is_an_error_too(toy_pipeline: Pipeline) -> None:
    class OverflowingDecoder(FakeVaeDecoder):
        def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
            outputs = super().run(feeds)
            outputs["images"][0, 1, 2, 3] = np.nan  # one value of the first picture
            return outputs

    toy_pipeline._vae_decoder = OverflowingDecoder()
    first, second = toy_pipeline.decode(begin(toy_pipeline, num_images=2))
    assert isinstance(first, NumericalError) and isinstance(second, np.ndarray)


def test_the_costs_of_a_pipeline_are_those_of_its_own_size(
    toy_pipeline: Pipeline, denoiser: FakeDenoiser
) -> None:
    config = BatcherConfig(max_batch_rows=6, cost_measurement_s=60.0)
    plan = measuring_plan(toy_pipeline)
    assert (plan.width, plan.height, len(plan.weights)) == (64, 64, 1)
    table = measure_costs(toy_pipeline, plan, config)
    assert denoiser.num_calls == 4 * 4  # 1, 2, 4 and 6 rows
    assert table.is_known(64 * 64) and table.decodes.ms(64 * 64, 1) is not None
