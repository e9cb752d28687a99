"""What a bundle was built from, as one hash: equal keys, equal bundles."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trainer.model import DiffusionModel, Encoder
from trainer.sources import digest_of_sources

PACKAGES = ("torch", "diffusers", "transformers", "onnx")
# The code that decides what is in a bundle and whether it is published; the samplers' has its own
# key (trainer.sampler_tables.samplers_key).
SOURCES = (
    "engine/bundle.py",
    "engine/families.py",
    "engine/fingerprint.py",
    "engine/samplers.py",
    "trainer/build_key.py",
    "trainer/encoder_modules.py",
    "trainer/export.py",
    "trainer/families.py",
    "trainer/ldm_pipeline.py",
    "trainer/model.py",
    "trainer/onnx_graphs.py",
    "trainer/parity.py",
    "trainer/previews.py",
    "trainer/splicing.py",
)


def package_versions() -> dict[str, str]:
    """The versions that decide what an export looks like."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def build_key(
    model: DiffusionModel,
    *,
    precision: str,
    samplers_key: str,
    sources: Sequence[str] = SOURCES,
) -> str:
    """SHA-256 over weights, configs, tokenizer, options, versions and the exporter's own code.

    Of the loaded parts and not of the files, so that a hub id and a folder are treated alike.
    """
    digest = hashlib.sha256(
        json.dumps(
            {
                "sources": digest_of_sources(sources),
                "precision": precision,
                "samplers": samplers_key,
                "versions": package_versions(),
                "name": model.name,
                "family": model.family.name,
                "zero_empty_negative": model.zero_empty_negative,
                "text_encoders": [_described(encoder) for encoder in model.encoders],
                "unet": _public(model.unet.config),
                "vae": _public(model.vae.config),
                "scheduler": _public(model.scheduler_config),
            },
            sort_keys=True,
            default=str,
        ).encode()
    )
    for module in model.modules.values():
        _update(digest, module)
    return digest.hexdigest()


def _described(encoder: Encoder) -> dict[str, Any]:
    return {
        "config": _public(encoder.text_encoder.config.to_dict()),
        "tokenizer": encoder.tokenizer.backend_tokenizer.to_str(),
        "special_tokens": encoder.tokenizer.special_tokens_map,
    }


def _public(config: Any) -> dict[str, Any]:
    """Without the private keys: they say where the model lies, not what it is."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def _update(digest: Any, module: nn.Module) -> None:
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
