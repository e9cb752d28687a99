"""A tiny model and random images to learn from, and how to look at a run."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.tiny_model import make_tiny_model
from trainer.checkpoints import RunIdentity
from trainer.images import TrainingImages
from trainer.latents import LatentDistribution
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.objective import Objective
from trainer.options import LearnOptions
from trainer.run import LearnState
from trainer.splicing import TemplatePrompts

SIZE = 16  # pixels; the latents are 8 x 8
TEMPLATES = ("a photo of {}", "a photo of a {}", "a {}")
OPTIONS = LearnOptions(steps=6, batch_size=2, eval_every=3)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(model_path: Path) -> DiffusionModel:
    return load_model(model_path)


@pytest.fixture
def own_model(model_path: Path) -> DiffusionModel:
    """A model that a test may change."""
    return load_model(model_path)


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    return random_images()


def make_tiny(path: Path) -> Path:
    return make_tiny_model(path, max_tokens=40, unet_channels=(8, 16), latent_size=8)


def tiny_model(path: Path) -> DiffusionModel:
    return load_model(make_tiny(path))


def random_images(count: int = 3, *, seed: int = 1) -> TrainingImages:
    generator = torch.Generator().manual_seed(seed)
    return TrainingImages(
        pixels=torch.rand((count, 3, SIZE, SIZE), generator=generator) * 2 - 1,
        names=tuple(f"{place}.png" for place in range(count)),
        sha256=tuple(f"{seed + place:064x}" for place in range(count)),
        upscaled=(),
        skipped=(),
    )


def objective_of(
    model: DiffusionModel, images: TrainingImages, *, num_vectors: int = 1
) -> Objective:
    """Of these images with the templates above, masked as they are."""
    return Objective.of(
        model,
        LatentDistribution.encode(model, images.pixels),
        TemplatePrompts.lay_out(model, TEMPLATES, num_vectors),
        masks=images.masks,
    )


def left_half(images: TrainingImages, *, masked: tuple[int, ...]) -> TrainingImages:
    """The images with masks over their left halves, at those places."""
    masks = torch.ones(len(images.names), 1, SIZE, SIZE)
    for place in masked:
        masks[place, :, :, SIZE // 2 :] = 0.0
    return dataclasses.replace(images, masks=masks)


def last_state(model: DiffusionModel, images: TrainingImages, options: LearnOptions) -> LearnState:
    return list(learn(model, images, options))[-1]


def identity_of(
    model: DiffusionModel, images: TrainingImages, options: LearnOptions
) -> RunIdentity:
    """Of a run that learns <cat>."""
    return RunIdentity.of(model, images, options, placeholder_token="<cat>")
