"""What a loaded model is, as one hash."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trainer.model import DiffusionModel, Encoder


def model_fingerprint(
    model: DiffusionModel,
    present: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> str:
    """SHA-256 over every weight, the configs of all parts, noise schedule and tokenizers.

    Of the loaded parts, so that it depends neither on where the model lies nor on the device or
    the memory format. `present` sees to it that a network has its weights for as long as they are
    read (trainer/component_memory.py).
    """
    described = {
        "family": model.family.name,
        "zero_empty_negative": model.zero_empty_negative,
        "text_encoders": [_described(encoder) for encoder in model.encoders],
        "unet": _public(model.unet.config),
        "vae": _public(model.vae.config),
        "scheduler": _public(model.scheduler_config),
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for part, module in model.modules.items():
        with present(part):
            for name, weight in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(_bytes(weight))
    return digest.hexdigest()


def _bytes(weight: Tensor) -> memoryview:
    # Flat before contiguous: channels last keeps a 1 x 1 convolution in an order of its own, and a
    # scalar has no bytes to view. As bytes, since NumPy lacks bfloat16.
    return weight.cpu().flatten().contiguous().view(torch.uint8).numpy().data


def _described(encoder: Encoder) -> dict[str, Any]:
    return {
        "config": _public(encoder.text_encoder.config.to_dict()),
        "tokenizer": encoder.tokenizer.backend_tokenizer.to_str(),
        "special_tokens": encoder.tokenizer.special_tokens_map,
    }


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the private keys: they say where the model lies, not what it is."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
