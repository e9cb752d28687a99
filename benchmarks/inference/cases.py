"""What is drawn: the embedded model, and random weights of Stable Diffusion 1.5's size."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size_configs import FAMILIES
from benchmarks.peers import MODEL
from benchmarks.random_model import make_model
from engine.bundle import MANIFEST, Manifest, read_manifest
from engine.files import sha256_of_file
from trainer.calibration import quantize_denoiser
from trainer.export import build_bundle

PROMPT = "a red car on a meadow"
SEED = 7
TIMESTEP = 500
ROWS = 2  # of a call: guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One size, with how often it is measured."""

    name: str
    title: str
    pixels: int
    steps: int
    guidance: float
    call_rounds: int
    image_rounds: int

    @property
    def is_full_size(self) -> bool:
        return self.name != "embedded"


CASES = {
    "embedded": Case(
        name="embedded",
        title="The embedded model, 64 px, 20 steps",
        pixels=64,
        steps=20,
        guidance=4.0,
        call_rounds=60,
        image_rounds=15,
    ),
    "256": Case(
        name="256",
        title="Stable Diffusion 1.5's size, random weights, 256 px, 4 steps",
        pixels=256,
        steps=4,
        guidance=4.0,
        call_rounds=5,
        image_rounds=3,
    ),
    "512": Case(
        name="512",
        title="Stable Diffusion 1.5's size, random weights, 512 px, 2 steps",
        pixels=512,
        steps=2,
        guidance=4.0,
        call_rounds=3,
        image_rounds=2,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A case with its files."""

    case: Case
    folder: Path  # of this case
    shared: Path  # of all cases of this model
    model: Path

    @property
    def settings(self) -> dict[str, Any]:
        case = self.case
        return {
            "feeds": str(self.folder / "feeds.npz"),
            "prompt": PROMPT,
            "pixels": case.pixels,
            "steps": case.steps,
            "guidance": case.guidance,
        }

    def bundle(self, kind: str) -> Path:
        """The bundle that a system reads, made when it is first asked for."""
        path = self.shared / f"bundle-{kind}"
        if not (path / MANIFEST).exists():
            building = path.with_name(f"{path.name}.building")
            shutil.rmtree(building, ignore_errors=True)
            {"fp32": self._make_fp32, "int8": self._make_int8}[kind](building)
            building.rename(path)
        return path

    def _make_fp32(self, path: Path) -> None:
        build_bundle(self.model, path, precision="fp32", samplers=("ddim",), max_steps=50)

    def _make_int8(self, path: Path) -> None:
        """Random weights have no quality that calibration could keep: one size for all, quickly."""
        if not self.case.is_full_size:
            build_bundle(self.model, path, precision="int8", samplers=("ddim",), max_steps=20)
            return
        shutil.copytree(self.bundle("fp32"), path)
        quantize_denoiser(path, pixels=256, num_prompts=1)
        renew_manifest(path)

    def model_for(self, environment: str | None) -> Path:
        """The diffusers folder; for optimum's older transformers as that wrote it."""
        if environment != "optimum-onnx":
            return self.model
        path = self.shared / "model-transformers-4"
        if not path.exists():
            shutil.copytree(self.model, path)
            _rename_for_transformers_4(path)
        return path

    def call_gflop(self) -> float:
        """Floating-point operations of one call, counted by PyTorch without computing it."""
        config = json.loads((self.model / "unet" / "config.json").read_text())
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(config)
            feeds = dict(np.load(self.folder / "feeds.npz"))
            inputs = [torch.zeros(feeds[name].shape) for name in ("latents", "prompt_embeds")]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(inputs[0], torch.zeros(()), inputs[1])
        return counter.get_total_flops() / 1e9


def prepare(case: Case, cache: Path) -> Prepared:
    """Model and inputs of a case, made once."""
    shared = cache / ("full-size" if case.is_full_size else "embedded")
    model = shared / "model" if case.is_full_size else MODEL
    if not (model / "model_index.json").exists():
        make_model(FAMILIES["sd15"], model)
    folder = shared / case.name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "feeds.npz").exists():
        _write_feeds(case, model, folder / "feeds.npz")
    return Prepared(case=case, folder=folder, shared=shared, model=model)


def _write_feeds(case: Case, model: Path, path: Path) -> None:
    config = json.loads((model / "unet" / "config.json").read_text())
    text = json.loads((model / "text_encoder" / "config.json").read_text())
    vae = json.loads((model / "vae" / "config.json").read_text())
    size = case.pixels // 2 ** (len(vae["block_out_channels"]) - 1)
    tokens, dim = text["max_position_embeddings"], config["cross_attention_dim"]
    random = np.random.default_rng(0)
    np.savez(
        path,
        latents=random.standard_normal((ROWS, config["in_channels"], size, size), np.float32),
        timestep=np.full(ROWS, TIMESTEP, np.float32),
        prompt_embeds=random.standard_normal((ROWS, tokens, dim), np.float32),
    )


def _rename_for_transformers_4(folder: Path) -> None:
    """Its names of the text encoder's weights, and of the tokenizer that reads tokenizer.json."""
    weights, index = folder / "text_encoder" / "model.safetensors", folder / "model_index.json"
    tensors = load_file(weights)
    if not any(name.startswith("text_model.") for name in tensors):
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    parts = json.loads(index.read_text())
    index.write_text(json.dumps({**parts, "tokenizer": ["transformers", "CLIPTokenizerFast"]}))


def renew_manifest(folder: Path) -> None:
    """Write down the hashes of files that were replaced."""
    manifest: Manifest = read_manifest(folder)
    files = {
        path.relative_to(folder).as_posix(): sha256_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json())
