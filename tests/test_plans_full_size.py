"""A UNet of Stable Diffusion 1.5's size, with random weights, through the real compiler."""

from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from engine.bundle import LatentSpec, Manifest, TextSpec
from engine.plans.compiler import Compilation, compile_plan
from engine.plans.profiles import buckets_of, profiles_of
from engine.plans.targets import CAPABILITIES, Target
from trainer.onnx_graphs import Denoiser, Graph, export_graph

MANIFEST = Manifest(
    format_version=1,
    family="stable-diffusion",
    model_name="sd",
    precision="fp16",
    prediction_type="epsilon",
    scheduler_config={},
    text=TextSpec(
        max_tokens=77,
        dim=768,
        output_dim=768,
        vocab_size=49408,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
        embedding_fingerprint="",
    ),
    latents=LatentSpec(
        channels=4,
        scale_factor=8,
        size_multiple=64,
        default_size=512,
        scaling_factor=0.18215,
        shift_factor=0.0,
    ),
    components={},
    files={},
    build_key="key",
)


def random_unet() -> UNet2DConditionModel:
    """runwayml/stable-diffusion-v1-5's unet/config.json."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=768,
        ).eval()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_full_size_unet_compiles_for_sm75_to_sm121_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = Graph(
        name="denoiser",
        module=Denoiser(random_unet().half()),
        inputs={
            "latents": ("rows", 4, "height", "width"),
            "timestep": ("rows",),
            "prompt_embeds": ("rows", "tokens", 768),
        },
        outputs={"noise_pred": ("rows", 4, "height", "width")},
        size_multiple=8,
        max_tokens=77,
        float32_inputs=("timestep",),
    )
    spec = export_graph(graph, tmp_path, precision="fp16")
    wanted = Compilation(
        onnx_path=tmp_path / spec.file,
        target=Target(CAPABILITIES),
        spec=spec,
        profiles=profiles_of("denoiser", spec, MANIFEST, buckets_of(MANIFEST.latents)),
    )
    plan = compile_plan(wanted, tmp_path / "denoiser.plan")
    assert [profile["latents"][2] for profile in plan.profiles] == [
        [16, 4, 64, 64],
        [16, 4, 96, 96],
    ]
    weights = 2 * 859_520_964  # parameters in float16; six capabilities share them
    assert weights < (tmp_path / "denoiser.plan").stat().st_size < 2 * weights
