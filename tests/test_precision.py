"""The denoiser in half precision, in parts and recomputed: the gradient stays what it is."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from tests.learning_setup import objective_of, random_images
from tests.tiny_model import make_tiny_model
from trainer import objective as objective_module
from trainer.errors import LearningError
from trainer.initializer import phrase_vectors
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions
from trainer.precision import unet_dtype
from trainer.sampling import sample_images
from trainer.splicing import as_concept

BATCH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return make_tiny_model(path, max_tokens=40, unet_channels=(8, 16), latent_size=8)


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    return load_model(folder)


def _gradient(model: DiffusionModel) -> torch.Tensor:
    objective = objective_of(model, random_images())
    batch = objective.draw(BATCH, torch.Generator().manual_seed(0))
    return objective.loss_and_gradient(phrase_vectors(model, None, 1), batch)[1]


# bfloat16 has 8 significant bits and float16 has 11: some twenty layers, forth and back, were seen
# to be off by 1 % and by 0.1 % of the gradient's length.
@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision_changes_the_gradient_by_its_rounding(
    folder: Path, model: DiffusionModel, dtype: torch.dtype, off: float
) -> None:
    half = load_model(folder, unet_dtype=dtype)
    assert half.unet.dtype is dtype
    expected, found = _gradient(model), _gradient(half)
    assert found.dtype is torch.float32
    assert 0.0 < (found - expected).norm() < off * expected.norm()


def test_float16_keeps_gradients_that_would_vanish_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last convolution made small, the gradient is: as it is behind many pixels."""
    exact, half = load_model(folder), load_model(folder, unet_dtype=torch.float16)
    for each in (exact, half):
        with torch.no_grad():
            each.unet.conv_out.weight *= 1e-4
    expected = _gradient(exact)
    off = (_gradient(half) - expected).norm() / expected.norm()
    monkeypatch.setattr(objective_module, "_GRADIENT_SCALES", {})
    unscaled = (_gradient(half) - expected).norm() / expected.norm()
    assert off < 0.05 < unscaled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_in_half_precision_keeps_its_state_in_float32(
    folder: Path, dtype: torch.dtype
) -> None:
    model = load_model(folder, unet_dtype=dtype)
    options = LearnOptions(steps=3, batch_size=2, eval_every=3)
    *_, state = learn(model, random_images(), options)
    for moved in (state.vectors, state.first_moment, state.second_moment, state.best_vectors):
        assert moved.dtype is torch.float32
    assert math.isfinite(state.best_evaluation_loss)
    for module in (model.text_encoder, model.vae):
        assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    concept = as_concept(model, state.best_vectors, placeholder_token="<cat>")
    (image,) = sample_images(model, [concept], ["a <cat>"], size=16, num_inference_steps=2)
    assert image.size == (16, 16)


@pytest.mark.parametrize("max_rows", [1, 4])
def test_a_step_in_several_passes_is_the_same_step(model: DiffusionModel, max_rows: int) -> None:
    options = LearnOptions(steps=3, batch_size=BATCH, eval_every=3)
    whole = list(learn(model, random_images(), options))
    parts = list(learn(model, random_images(), options, max_rows=max_rows))
    for one, other in zip(whole, parts, strict=True):
        # Sums in another order; Adam's first steps divide by a gradient of about the same size.
        torch.testing.assert_close(other.vectors, one.vectors, rtol=0, atol=1e-5)
        assert other.loss == pytest.approx(one.loss, rel=1e-5, nan_ok=True)


def test_passes_hold_no_more_samples_than_allowed(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = model.unet.forward

    def counted(sample: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            rows.append(len(sample))
        return forward(sample, *rest, **named)

    monkeypatch.setattr(model.unet, "forward", counted)
    list(learn(model, random_images(), LearnOptions(steps=2, batch_size=5), max_rows=2))
    assert rows == [2, 2, 1] * 2


def test_gradient_checkpointing_gives_the_same_gradient(
    folder: Path, model: DiffusionModel
) -> None:
    again, entered = load_model(folder), list[None]()
    again.unet.enable_gradient_checkpointing()
    block: Any = again.unet.mid_block
    block.resnets[-1].register_forward_pre_hook(lambda *_: entered.append(None))
    # The same operations on the same numbers, computed twice.
    torch.testing.assert_close(_gradient(again), _gradient(model), rtol=0, atol=0)
    assert len(entered) == 2


def test_convolutions_have_channels_last(model: DiffusionModel) -> None:
    for module in (model.unet, model.vae):
        assert isinstance(module, UNet2DConditionModel | AutoencoderKL)
        for weight in module.parameters():
            assert weight.ndim < 4 or weight.is_contiguous(memory_format=torch.channels_last)


def test_auto_is_float32_on_a_cpu_and_names_are_checked() -> None:
    assert unet_dtype("auto", "cpu") is torch.float32
    assert unet_dtype("bfloat16", "cpu") is torch.bfloat16
    with pytest.raises(LearningError, match="got 'int8'"):
        unet_dtype("int8", "cpu")  # pyright: ignore[reportArgumentType]
