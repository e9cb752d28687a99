"""Concept files as other tools make them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.concepts import Concept
from engine.dialects.readers import read_concepts

DIM = 24  # of the tiny model
VECTORS = torch.linspace(-1, 1, 2 * DIM).reshape(2, DIM)
VECTORS_2 = torch.linspace(2, 3, 2 * 40).reshape(2, 40)


both_containers = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save_torch(value: object, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def save_safe(tensors: dict[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def only(path: Path, **options: Any) -> Concept:
    (concept,) = read_concepts(path, **options)
    return concept


def assert_holds(
    concept: Concept, token: str, vectors: torch.Tensor, second: torch.Tensor | None = None
) -> None:
    assert concept.placeholder_token == token
    np.testing.assert_array_equal(concept.learned_embeddings, vectors.numpy(), strict=True)
    if second is None:
        assert concept.learned_embeddings_2 is None
    else:
        np.testing.assert_array_equal(concept.learned_embeddings_2, second.numpy(), strict=True)


def a1111(**changes: object) -> dict[str, object]:
    """`Embedding.save` of AUTOMATIC1111's modules/textual_inversion."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": VECTORS.clone().requires_grad_()},
        "name": "my-style-2500",
        "step": 2500,
        "sd_checkpoint": "a9263745",
        "sd_checkpoint_name": None,
    } | changes
