"""A model of true size with random weights, made on disk without ever being in memory.

Only the vocabulary is the embedded model's, since a tokenizer has no random weights.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import nn

from benchmarks.full_size_configs import FullSize
from benchmarks.peers import MODEL


def make_model(family: FullSize, folder: Path, *, seed: int = 0) -> None:
    """Write a diffusers folder, a network and in it a weight at a time."""
    rng = np.random.default_rng(seed)
    index: dict[str, Any] = {"_class_name": family.pipeline}
    for number, (kind, config) in enumerate(family.text_encoders, start=1):
        suffix = "" if number == 1 else f"_{number}"
        _write_text_encoder(kind, config, folder, suffix, rng)
        index[f"text_encoder{suffix}"] = ["transformers", kind]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    networks = {"unet": ("UNet2DConditionModel", family.unet), "vae": ("AutoencoderKL", family.vae)}
    for name, (kind, config) in networks.items():
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**config)
        network.save_config(folder / name)
        write_random_weights(network, folder / name / "diffusion_pytorch_model.safetensors", rng)
        index[name] = ["diffusers", kind]
    diffusers.DDIMScheduler(**family.scheduler).save_config(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _write_text_encoder(
    kind: str, config: dict[str, Any], folder: Path, suffix: str, rng: np.random.Generator
) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL / "tokenizer", model_max_length=77)
    if suffix:
        tokenizer.pad_token = "!"  # as SDXL's second one
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    whole = transformers.CLIPTextConfig(**config, vocab_size=len(tokenizer), **ids)
    with torch.device("meta"):
        network = getattr(transformers, kind)(whole)
    path = folder / f"text_encoder{suffix}"
    whole.save_pretrained(path)
    write_random_weights(network, path / "model.safetensors", rng)
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")


def write_random_weights(network: nn.Module, file: Path, rng: np.random.Generator) -> None:
    """Write a safetensors file for a network whose weights are on the meta device.

    Distributed as PyTorch initializes: uniform within 1 / sqrt(inputs of a unit); norms 1 and 0;
    embeddings normal with deviation 0.02, as CLIP's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for values in _random_weights(network, rng):
            stream.write(values.astype("<f4", copy=False).tobytes())


def _random_weights(network: nn.Module, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """In the order of `named_parameters`."""
    for module in network.modules():
        weights = dict(module.named_parameters(recurse=False))
        fan_in = int(np.prod(weights["weight"].shape[1:])) if "weight" in weights else 0
        for name, weight in weights.items():
            shape = tuple(weight.shape)
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                yield np.full(shape, float(name == "weight"), np.float32)
            elif isinstance(module, nn.Embedding):
                yield 0.02 * rng.standard_normal(shape, np.float32)
            else:
                values = rng.random(shape, np.float32)
                values -= 0.5
                values *= 2 / fan_in**0.5
                yield values
