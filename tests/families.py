"""What the tests of every family of models do: bundles, vectors, references with them, images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.pipeline import Pipeline, sound
from engine.requests import GenerationRequest
from trainer.export import BuildReport, build_bundle
from trainer.model import DiffusionModel, load_model

# Rounding to 8 bits alone gives 58.9 dB; the rest is float32 in another order.
MIN_PSNR_DB = 55.0
# Of words that the tiny tokenizers have whole: others are several tokens each.
TEMPLATES = ("a photo of {}", "a drawing of the {}", "{} in the morning", "red {}")


# Fixtures of a test file that has `folder`, a model of its family.


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    output = tmp_path_factory.mktemp("bundles") / "bundle"
    return build_bundle(folder, output, samplers=["ddim"], max_steps=8)


@pytest.fixture(scope="module")
def pipeline(report: BuildReport) -> Pipeline:
    return Pipeline.open(report.path)


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
    return sound(pipeline.decode(images))[0] / 255.0
