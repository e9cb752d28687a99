"""The benchmark of models of true size, on small ones: what it makes is a model, and is told."""

from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from benchmarks.full_size_configs import FAMILIES, FullSize
from benchmarks.full_size_report import describe
from benchmarks.random_model import make_model
from trainer.model import load_model

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 12,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
}
VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
}
SMALL = FullSize(
    title="small",
    pipeline="StableDiffusionXLPipeline",
    unet=UNET,
    vae=VAE,
    text_encoders=(("CLIPTextModel", TEXT), ("CLIPTextModelWithProjection", TEXT)),
    prediction_type="v_prediction",
)


def test_what_is_made_is_a_model_with_weights_as_pytorch_initializes_them(tmp_path: Path) -> None:
    make_model(SMALL, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.prediction_type == "v_prediction" and model.dims == (16, 16)
    for module in model.unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    weight = model.unet.conv_in.weight  # 4 channels, 3 x 3: uniform within 1 / 6
    assert 0.95 / 6 < weight.abs().max().item() <= 1 / 6
    assert weight.std().item() == pytest.approx(1 / 6 / 3**0.5, rel=0.1)  # of 1152 numbers
    first, second = (encoder.token_embedding for encoder in model.encoders)
    assert first.std().item() == pytest.approx(0.02, rel=0.05) and not torch.equal(first, second)


# Numbers of parameters in millions, vocabularies left out: SD 1.5 and SD 2.1 as their model cards
# and files give them, SDXL's UNet 2.6 billion in Podell et al. 2023, arXiv 2307.01952, table 1.
@pytest.mark.parametrize(("family", "millions"), [("sd15", 860), ("sd21", 866), ("sdxl", 2567)])
def test_the_unets_are_of_the_real_size(family: str, millions: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FAMILIES[family].unet)
    count = sum(weight.numel() for weight in unet.parameters())
    assert round(count / 1e6) == pytest.approx(millions, abs=1)


def test_a_report_has_every_figure_and_reason() -> None:
    stage = {"seconds": 12.0, "peak_mb": 4096, "peak_own_mb": 1024}
    found = {
        "date": "2026-01-01",
        "processor": "a processor",
        "cores": 2,
        "memory_gb": 24,
        "versions": {"torch": "2"},
        "stages": {"export denoiser": stage},
        "parity": {
            "max_relative_error": {"vae_decoder": {"images": 2e-6}},
            "image_psnr_db": 58.94,
            "float32_islands": {"vae_decoder": "numbers reach 1e+06 in vae.decoder"},
        },
        "precision": {"vae_decoder": "fp32"},
        "bundle_mb": 2048,
        "image_256_px_4_steps_s": None,
    }
    text = describe({"sdxl fp16": found})
    for part in (
        "## Stable Diffusion XL base 1.0, float16",
        "Peak of the build 4.0 GB, own 1.0 GB; 12 s; bundle 2.0 GB.",
        "| export denoiser | 12 | 4.0 | 1.0 |",
        "| vae_decoder | fp32 | 2.0e-06 |",
        "58.9 dB PSNR",
        "vae_decoder is float32: numbers reach 1e+06 in vae.decoder.",
    ):
        assert part in text
