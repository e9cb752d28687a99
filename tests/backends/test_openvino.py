"""OpenVINO draws what ONNX Runtime draws, takes every kind of bundle, and says when it cannot."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backends.opening import open_model
from engine.backends.openvino_session import OpenVinoSession, openvino_core
from engine.errors import BundleError, ProviderUnavailable
from engine.pipeline import ImageInFlight, ImageModel, Pipeline
from engine.requests import GenerationRequest
from tests.tiny_model import make_tiny_xl_model
from trainer.export import build_bundle

openvino = pytest.importorskip("openvino")

HAS_BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
REQUEST = GenerationRequest(prompt="a red fish", seed=3, num_inference_steps=6, sampler="ddim")
# Of latents, over their range, after six guided steps: sums in another order; measured 5e-6.
TOLERANCE = 1e-4
# Eight bits of mantissa in every product, 4e-3 of each; measured 6e-2. Another prompt: 2.7.
BFLOAT16_TOLERANCE = 2e-1


@pytest.fixture(scope="module")
def model(pipeline: Pipeline) -> ImageModel:
    return open_model(pipeline.bundle, "openvino")


def draw(
    pipeline: Pipeline, model: ImageModel, *requests: GenerationRequest
) -> list[ImageInFlight]:
    """All requests in one batch, as far as each has steps."""
    images = [image for one in requests for image in model.begin(pipeline.plan(one))]
    while left := [image for image in images if not image.is_done]:
        model.step(left)
    return images


def difference(one: ImageInFlight, two: ImageInFlight) -> float:
    return float(np.abs(one.latents - two.latents).max() / np.abs(two.latents).max())


def test_an_image_is_that_of_onnx_runtime(pipeline: Pipeline, model: ImageModel) -> None:
    (ours,), (theirs,) = draw(pipeline, model, REQUEST), draw(pipeline, pipeline, REQUEST)
    assert difference(ours, theirs) < TOLERANCE
    (picture,), (other) = model.decode([ours]), pipeline.decode([theirs])[0]
    assert isinstance(picture, np.ndarray) and isinstance(other, np.ndarray)
    assert np.abs(picture.astype(int) - other.astype(int)).max() <= 1  # rounded to 8 bits


def test_an_image_to_begin_with_is_encoded(pipeline: Pipeline, model: ImageModel) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    request = dataclasses.replace(REQUEST, init_image=photo, strength=0.7)
    (ours,), (theirs,) = draw(pipeline, model, request), draw(pipeline, pipeline, request)
    assert difference(ours, theirs) < TOLERANCE


def test_an_image_is_what_it_would_be_alone(pipeline: Pipeline, model: ImageModel) -> None:
    """In company of one without guidance, one of other length and size of prompt."""
    others = (
        dataclasses.replace(REQUEST, seed=5, guidance_scale=1.0, num_inference_steps=3),
        dataclasses.replace(REQUEST, prompt="a blue bird", num_inference_steps=9),
    )
    (alone,) = draw(pipeline, model, REQUEST)
    assert difference(draw(pipeline, model, REQUEST, *others)[0], alone) < TOLERANCE


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16 arithmetic")
def test_bfloat16_draws_nearly_the_same(pipeline: Pipeline) -> None:
    model = open_model(pipeline.bundle, "openvino-bf16")
    (ours,), (theirs,) = draw(pipeline, model, REQUEST), draw(pipeline, pipeline, REQUEST)
    assert TOLERANCE < difference(ours, theirs) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_encoders_and_added_inputs(tmp_path: Path, precision: Any) -> None:
    model = make_tiny_xl_model(tmp_path / "model")
    build_bundle(model, tmp_path / "b", precision=precision, samplers=("ddim",), max_steps=9)
    pipeline = Pipeline.open(tmp_path / "b")
    other = open_model(pipeline.bundle, "openvino")
    (ours,), (theirs,) = draw(pipeline, other, REQUEST), draw(pipeline, pipeline, REQUEST)
    # ONNX Runtime rounds float16 between operators, OpenVINO computes such a graph in float32.
    assert difference(ours, theirs) < (TOLERANCE if precision == "fp32" else 2e-2)


def test_without_openvino_the_remedy_is_told(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for backend in ("openvino", "openvino-bf16"):
        with pytest.raises(ProviderUnavailable, match=r"pip install oneword\[openvino\]"):
            open_model(pipeline.bundle, backend)


def test_bfloat16_that_would_be_float32_is_refused(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldProcessor:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", OldProcessor)
    with pytest.raises(ProviderUnavailable, match="no bfloat16 arithmetic.*here in FP32, INT8"):
        open_model(pipeline.bundle, "openvino-bf16")


def test_a_graph_that_it_cannot_read_is_named(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "denoiser.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"denoiser\.onnx cannot be loaded by OpenVINO"):
        OpenVinoSession(openvino.Core(), tmp_path / "denoiser.onnx", "f32")


def test_every_attention_is_one_operator_there(pipeline: Pipeline) -> None:
    """ONNX Runtime's own node is put into OpenVINO's, which its CPU plugin computes as one."""
    graph = openvino_core("f32").read_model(str(pipeline.bundle.path / "denoiser.onnx"))
    kinds = [operation.get_type_name() for operation in graph.get_ops()]
    assert kinds.count("ScaledDotProductAttention") > 0 and "MultiHeadAttention" not in kinds
