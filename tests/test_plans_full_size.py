"""UNets of Stable Diffusion 1.5 and SDXL, with random weights, through the real compiler."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from benchmarks.full_size_configs import FAMILIES
from engine.families import NUM_TIME_IDS
from engine.plans.compiler import Compilation, compile_plan
from engine.plans.profiles import buckets_of, profiles_of
from engine.plans.targets import CAPABILITIES, Target
from tests.manifests import sd15_manifest
from trainer.onnx_graphs import AddedInputsDenoiser, Denoiser, Graph, export_graph


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("family", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_a_full_size_unet_compiles_for_sm75_to_sm121_without_a_gpu(
    tmp_path: Path, family: str, parameters: int
) -> None:
    pytest.importorskip("tensorrt_rtx")
    config = FAMILIES[family].unet
    size = config["sample_size"]
    spec = export_graph(_denoiser(config), tmp_path, precision="fp16")
    usual = sd15_manifest()
    latents = dataclasses.replace(usual.latents, default_size=8 * size)
    manifest = dataclasses.replace(usual, latents=latents)
    wanted = Compilation(
        onnx_path=tmp_path / spec.file,
        target=Target(CAPABILITIES),
        spec=spec,
        profiles=profiles_of("denoiser", spec, manifest, buckets_of(manifest.latents)),
    )
    plan = compile_plan(wanted, tmp_path / "denoiser.plan")
    assert [profile["latents"][2] for profile in plan.profiles] == [
        [16, 4, size, size],
        [16, 4, 3 * size // 2, 3 * size // 2],
    ]
    weights = 2 * parameters  # in float16; six capabilities share them
    assert weights < (tmp_path / "denoiser.plan").stat().st_size < 2 * weights


def _denoiser(config: dict[str, Any]) -> Graph:
    """The graph of a UNet with random weights, never in float32: SDXL's would take 10 GB."""
    torch.set_default_dtype(torch.float16)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(**config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    added: dict[str, tuple[int | str, ...]] = {}
    if "addition_embed_type" in config:
        added = {"text_embeds": ("rows", 1280), "time_ids": ("rows", NUM_TIME_IDS)}
    return Graph(
        name="denoiser",
        module=AddedInputsDenoiser(unet) if added else Denoiser(unet),
        inputs={
            "latents": ("rows", 4, "height", "width"),
            "timestep": ("rows",),
            "prompt_embeds": ("rows", "tokens", config["cross_attention_dim"]),
            **added,
        },
        outputs={"noise_pred": ("rows", 4, "height", "width")},
        size_multiple=2 ** (len(config["block_out_channels"]) - 1),
        max_tokens=77,
        float32_inputs=("timestep", "time_ids"),
    )
