"""A bundle of Stable Diffusion 1.5's size, of random weights: does it build, what does it cost?

    python -m benchmarks.full_size FOLDER [--keep]      (about 12 GB of disk, 16 GB of memory)

The graphs are those of the real model (widths, layers, 77 tokens); only the vocabulary is the
embedded model's, since a tokenizer has no random weights. Nothing here speaks of image quality.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.memory import peak_mb
from benchmarks.peers import MODEL
from benchmarks.run import machine
from engine.batching.batcher import Batcher, generate
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest
from trainer.export import build_bundle
from trainer.quiet import quiet_libraries

UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def make_model(folder: Path) -> None:
    """Save a Stable Diffusion 1.5 with random weights in the diffusers layout."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer", model_max_length=77)
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = CLIPTextConfig(**TEXT, vocab_size=len(tokenizer), **ids)  # pyright: ignore
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=PNDMScheduler(**SCHEDULER),  # pyright: ignore
        safety_checker=None,  # pyright: ignore
        feature_extractor=None,  # pyright: ignore
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave model and bundle there")
    arguments = parser.parse_args()
    quiet_libraries()
    model, bundle = arguments.folder / "model", arguments.folder / "bundle"
    if not (model / "model_index.json").exists():
        make_model(model)
    started = time.monotonic()

    def tell(stage: str, done: int, total: int) -> None:
        if done == total:
            print(f"{stage}: {time.monotonic() - started:.0f} s so far", flush=True)

    # One sampler for a few steps: their tables do not depend on the size of the model.
    report = build_bundle(model, bundle, samplers=("ddim",), max_steps=20, progress=tell)
    results: dict[str, Any] = {"machine": machine(), "seconds": report.seconds}
    results["build_peak_mb"] = peak_mb()
    if report.parity:
        results["parity"] = {
            "max_relative_error": report.parity.max_relative_error,
            "image_psnr_db": report.parity.image_psnr_db,
        }
    results["image_256_px_4_steps_s"] = _draw(bundle)
    print(json.dumps(results, indent=2))
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


def _draw(bundle: Path) -> float:
    pipeline = Pipeline.open(bundle)
    batcher = Batcher(pipeline)
    request = GenerationRequest(prompt="a dog", width=256, height=256, num_inference_steps=4)
    started = time.monotonic()
    generate(batcher, pipeline.plan(request))
    batcher.close()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
