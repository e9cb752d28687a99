"""Images that stay on the device against those of numpy, step for step.

The device is the host's memory and the graphs run in ONNX Runtime, by address: the code is that of
the CUDA backend, and the numbers are the pipeline's own.
"""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backends.device_model import MAX_SHAPES, DeviceImageModel
from engine.backends.opening import ort_programs
from engine.backends.ort_program import OrtProgram
from engine.backends.slots import FIRST_CAPACITY
from engine.batching.batcher import Batcher, generate
from engine.batching.config import BatcherConfig
from engine.batching.cost_measurement import measure_costs, measuring_plan
from engine.bundle import Bundle
from engine.errors import InvalidRequest, NumericalError
from engine.pipeline import ImageInFlight, ImageModel, Pipeline
from engine.requests import GenerationRequest
from engine.serving.deployment import try_out
from tests.backends.host_device import HostDevice
from tests.tiny_model import make_tiny_xl_model
from trainer.export import build_bundle

# Kernels may sum in another order for another batch size; nothing else may differ.
BATCH_TOLERANCE = 1e-4


@pytest.fixture
def model(pipeline: Pipeline) -> DeviceImageModel:
    return device_model(pipeline.bundle)


def device_model(bundle: Bundle) -> DeviceImageModel:
    return DeviceImageModel(bundle, HostDevice(), ort_programs(bundle, num_threads=1))


def request(prompt: str = "a red fish", **changes: Any) -> GenerationRequest:
    usual = GenerationRequest(prompt=prompt, seed=3, num_inference_steps=6, negative_prompt="blue")
    return dataclasses.replace(usual, **changes)


def begin(
    pipeline: Pipeline, model: ImageModel, *requests: GenerationRequest
) -> list[ImageInFlight]:
    return [image for one in requests for image in model.begin(pipeline.plan(one))]


def finish(model: ImageModel, images: Sequence[ImageInFlight]) -> None:
    while not all(image.is_done for image in images):
        model.step([image for image in images if not image.is_done])


def slots_in_use(model: DeviceImageModel) -> int:
    gc.collect()
    return sum(slots.in_use for slots in model._slots.values())


def test_every_sampler_draws_the_same_image(pipeline: Pipeline, model: DeviceImageModel) -> None:
    for sampler in sorted(pipeline.bundle.sampler_tables):
        ours = begin(pipeline, model, request(sampler=sampler))
        reference = begin(pipeline, pipeline, request(sampler=sampler))
        finish(model, ours)
        finish(pipeline, reference)
        scale = np.abs(reference[0].latents).max()
        # The same float32 arithmetic in the same order; 2e-6 allows a fused product here and there.
        difference = model.current_latents(ours[0]) - reference[0].latents
        assert np.abs(difference).max() <= 2e-6 * scale, sampler
        (picture,), (expected,) = model.decode(ours), pipeline.decode(reference)
        assert not isinstance(picture, NumericalError) and not isinstance(expected, NumericalError)
        # 8-bit output: rounding may tip a value over an edge.
        assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1, sampler


MIXED = (
    request("a fox", sampler="euler_a", seed=1),
    request("a fox", sampler="dpmpp_2m", seed=2, num_inference_steps=5, guidance_scale=1.0),
    request("a fox", sampler="pndm", seed=4, num_inference_steps=8),
    request("a house " * 20, sampler="ddim", seed=5),  # more chunks: another shape
    request("a fox", sampler="lms", seed=6, guidance_scale=3.0),
    request("a fox", sampler="ddim", seed=7, guidance_start=0.3, guidance_end=0.7),
)


def test_images_join_and_leave_in_mid_flight(pipeline: Pipeline, model: DeviceImageModel) -> None:
    waiting = begin(pipeline, model, *MIXED)
    reference = begin(pipeline, pipeline, *MIXED)
    finish_alone(pipeline, reference)
    everything, in_flight = list(waiting), [waiting.pop(0)]
    while in_flight:
        for key in {image.shape_key for image in in_flight}:
            model.step([image for image in in_flight if image.shape_key == key])
        in_flight = [image for image in in_flight if not image.is_done]
        if waiting:
            in_flight.append(waiting.pop(0))
    for ours, theirs in zip(everything, reference, strict=True):
        scale = np.abs(theirs.latents).max()
        np.testing.assert_allclose(
            model.current_latents(ours) / scale, theirs.latents / scale, atol=BATCH_TOLERANCE
        )


def finish_alone(model: ImageModel, images: Sequence[ImageInFlight]) -> None:
    for image in images:
        finish(model, [image])


def test_more_images_than_slots_make_room_without_a_trace(
    pipeline: Pipeline, model: DeviceImageModel
) -> None:
    """The first is half done when the others need room, which moves everything."""
    first = begin(pipeline, model, request(seed=11, sampler="pndm"))
    for _ in range(3):
        model.step(first)
    crowd = request(seed=20, num_images=FIRST_CAPACITY + 3, guidance_scale=1.0)
    others = begin(pipeline, model, crowd)
    model.step(others)
    finish(model, first)
    reference = begin(pipeline, pipeline, request(seed=11, sampler="pndm"))
    finish(pipeline, reference)
    assert np.array_equal(model.current_latents(first[0]), reference[0].latents)


def test_slots_are_free_again_however_an_image_ends(
    pipeline: Pipeline, model: DeviceImageModel
) -> None:
    images = begin(pipeline, model, request(num_images=4))
    assert slots_in_use(model) == 0, "who waits needs none"
    model.step(images)
    assert slots_in_use(model) == 4
    model.release(images[:1])
    model.release(images[:1])
    assert slots_in_use(model) == 3
    finish(model, images[1:3])
    model.decode(images[1:3])
    assert slots_in_use(model) == 1
    images.clear()  # dropped without a word, as a worker process drops what is forgotten
    assert slots_in_use(model) == 0


def test_what_is_not_finite_is_an_error_for_that_image_alone(
    pipeline: Pipeline, model: DeviceImageModel
) -> None:
    broken = begin(pipeline, model, request(sampler="pndm"))
    broken[0].latents = np.full_like(broken[0].latents, np.nan)
    sound = begin(pipeline, model, request(sampler="pndm", seed=8))
    for _ in range(3):
        model.step([*broken, *sound])
    finish(model, sound)
    picture, fault = model.decode([*sound, *broken])
    assert isinstance(fault, NumericalError) and not isinstance(picture, NumericalError)
    alone = drawn(pipeline, request(sampler="pndm", seed=8))
    # 8-bit output: rounding may tip a value over an edge.
    assert np.abs(picture.astype(int) - alone.astype(int)).max() <= 1


def test_a_slot_keeps_nothing_of_the_image_before(
    pipeline: Pipeline, model: DeviceImageModel
) -> None:
    """Every slot had an image whose latents and history are NaN."""
    broken = begin(pipeline, model, request(sampler="pndm", num_images=FIRST_CAPACITY))
    for image in broken:
        image.latents = np.full_like(image.latents, np.nan)
    for _ in range(4):
        model.step(broken)
    model.release(broken)
    assert slots_in_use(model) == 0
    sound = begin(pipeline, model, request(sampler="pndm", seed=8))
    finish(model, sound)
    (picture,) = model.decode(sound)
    assert np.array_equal(np.asarray(picture), drawn(pipeline, request(sampler="pndm", seed=8)))


def drawn(pipeline: Pipeline, wanted: GenerationRequest) -> np.ndarray:
    """The pipeline's own picture, alone in its calls."""
    images = begin(pipeline, pipeline, wanted)
    finish(pipeline, images)
    (picture,) = pipeline.decode(images)
    return np.asarray(picture)


def test_previews_are_those_of_the_pipeline(pipeline: Pipeline, model: DeviceImageModel) -> None:
    ours, reference = (begin(pipeline, m, request()) for m in (model, pipeline))
    assert model.preview(ours[0]) is None
    for _ in range(2):
        model.step(ours)
        pipeline.step(reference)
        found, expected = model.preview(ours[0]), pipeline.preview(reference[0])
        assert found is not None and expected is not None
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_an_initial_image_is_encoded_on_the_device(
    pipeline: Pipeline, model: DeviceImageModel
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    size: dict[str, Any] = {"width": 192, "height": 128, "init_image": picture, "strength": 0.6}
    ours, reference = (begin(pipeline, m, request(**size)) for m in (model, pipeline))
    finish(model, ours)
    finish(pipeline, reference)
    scale = np.abs(reference[0].latents).max()
    difference = np.abs(model.current_latents(ours[0]) - reference[0].latents).max()
    assert difference <= 2e-6 * scale


def test_memory_of_shapes_that_nobody_draws_is_given_back(
    pipeline: Pipeline, model: DeviceImageModel
) -> None:
    multiple = pipeline.bundle.manifest.latents.size_multiple
    for index in range(MAX_SHAPES + 2):
        side = multiple * (2 + index)
        images = begin(pipeline, model, request(width=side, height=multiple, num_inference_steps=1))
        finish(model, images)
        model.decode(images)
    assert len(model._slots) <= MAX_SHAPES


def test_a_bundle_whose_plans_take_one_size_is_tried_out_at_that(
    pipeline: Pipeline, model: DeviceImageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--bucket 512` alone: half of it is refused, and would have kept the bundle from service."""
    spec = pipeline.bundle.manifest.latents
    latent_side, drawn = spec.default_size // spec.scale_factor, list[tuple[int, ...]]()

    def takes(_: OrtProgram, shapes: Mapping[str, Sequence[int]]) -> bool:
        drawn.append(tuple(shapes["latents"][2:]))
        return drawn[-1] == (latent_side, latent_side)

    monkeypatch.setattr(OrtProgram, "takes", takes)
    try_out(pipeline, model)
    assert drawn[0] == (latent_side // 2, latent_side // 2) and len(set(drawn)) == 2
    monkeypatch.setattr(OrtProgram, "takes", lambda *_: False)
    with pytest.raises(InvalidRequest, match="ONNX Runtime takes every size"):
        try_out(pipeline, model)


def test_the_batcher_serves_it_like_any_model(pipeline: Pipeline, model: DeviceImageModel) -> None:
    try_out(pipeline, model)
    config = BatcherConfig(cost_measurement_s=0.2, max_batch_rows=12)
    costs = measure_costs(model, measuring_plan(pipeline), config)
    assert costs.steps.ms(pipeline.bundle.manifest.latents.default_size**2, 1)
    batcher, reference = Batcher(model), Batcher(pipeline)
    try:
        plan = pipeline.plan(request(num_images=3, sampler="euler_a"))
        ours, _ = generate(batcher, plan)
        expected, _ = generate(reference, plan)
    finally:
        batcher.close()
        reference.close()
    assert len(ours) == 3
    for found, image in zip(ours, expected, strict=True):
        assert np.abs(found.image.astype(int) - image.image.astype(int)).max() <= 1
    assert slots_in_use(model) == 0


def test_added_inputs_of_the_denoiser_are_kept_in_the_slots(tmp_path: Path) -> None:
    """Stable Diffusion XL: pooled text and sizes for each row, and two text encoders."""
    folder = make_tiny_xl_model(tmp_path / "xl")
    build_bundle(folder, tmp_path / "bundle", samplers=["ddim"], max_steps=8)
    pipeline = Pipeline.open(tmp_path / "bundle")
    model = device_model(pipeline.bundle)
    wanted = (request("a cat", sampler="ddim"), request("a dog", sampler="ddim", seed=9))
    ours, reference = (begin(pipeline, m, *wanted) for m in (model, pipeline))
    finish(model, ours)
    finish(pipeline, reference)
    for found, expected in zip(ours, reference, strict=True):
        scale = np.abs(expected.latents).max()
        difference = np.abs(model.current_latents(found) - expected.latents).max()
        assert difference <= 2e-6 * scale
