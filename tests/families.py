"""What the tests of every family of models do: vectors, references with them, and images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.pipeline import Pipeline
from engine.requests import GenerationRequest
from trainer.model import DiffusionModel


def random_vectors(model: DiffusionModel, num_vectors: int) -> Tensor:
    """For all encoders side by side; long enough to be heard beside random weights."""
    generator = torch.Generator().manual_seed(5)
    return 0.6 * torch.randn((num_vectors, sum(model.dims)), generator=generator)


def grow(text_encoder: Any, tokenizer: Any, names: list[str], vectors: Tensor) -> Tensor:
    """Add tokens to a vocabulary with these vectors; the table, which then wants a gradient."""
    tokenizer.add_tokens(names)
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table: Tensor = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-len(names) :] = vectors
    return table.requires_grad_(True)


def draw(pipeline: Pipeline, request: GenerationRequest) -> np.ndarray:
    """The first image of a request, [height, width, 3] in [0, 1]."""
    images = pipeline.begin(pipeline.plan(request))
    while not images[0].is_done:
        pipeline.step(images)
    return pipeline.decode(images)[0] / 255.0
