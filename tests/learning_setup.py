"""A tiny model and random images to learn from, and how to look at a run."""

import argparse
import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.requests import RgbImage
from tests.tiny_model import make_tiny_model
from trainer import cli
from trainer.checkpoints import RunIdentity
from trainer.encoders import Embeds, EncoderDescription
from trainer.images import TrainingImages, read_images
from trainer.latents import LatentDistribution
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.objective import Objective
from trainer.options import LearnOptions
from trainer.run import LearnState
from trainer.splicing import TemplatePrompts

SIZE = 16  # pixels; the latents are 8 x 8
TEMPLATES = ("a photo of {}", "a photo of a {}", "a {}")
OPTIONS = LearnOptions(steps=6, batch_size=2, eval_every=3, learning_rate=3e-3)
COMMAND_OPTIONS = LearnOptions(steps=6, batch_size=2, eval_every=2)  # of `learn_arguments`


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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "cat")


@pytest.fixture(scope="module")
def states(model: DiffusionModel, folder: Path) -> list[LearnState]:
    """The run of `learn_arguments`."""
    images = read_images(folder, size=SIZE, placeholder_token="<cat>")
    return list(learn(model, images, COMMAND_OPTIONS))


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


def image_folder(folder: Path, *, seed: int = 0) -> Path:
    """A folder of two images of noise."""
    folder.mkdir(parents=True)
    for place in range(2):
        generator = np.random.default_rng((seed, place))
        values = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{place}.png")
    return folder


def learn_arguments(model: Path, output: Path, *more: str | Path) -> argparse.Namespace:
    """Of `oneword learn`: six steps, evaluated after each second one."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    fixed = ["--model", model, "--output", output, "--steps", "6", "--batch-size", "2"]
    fixed += ["--eval-every", "2", "--device", "cpu"]
    return parser.parse_args([str(word) for word in (*fixed, *more)])


class PatchEncoder:
    """Pictures as 4 x 4 patches of colour; sentences as noise of their own."""

    def __init__(self, *, reads_text: bool = True) -> None:
        self.description = EncoderDescription(
            name="patches",
            kind="clip" if reads_text else "dino",
            identity="none",
            image_size=SIZE,
            reads_text=reads_text,
            judges="colours",
        )

    def image_embeds(self, images: Sequence[RgbImage]) -> Embeds:
        patches = np.stack(images).reshape(-1, 4, SIZE // 4, 4, SIZE // 4, 3) / 255.0
        return (patches.mean(axis=(2, 4)) - 0.5).reshape(-1, 48).astype(np.float32)

    def text_embeds(self, sentences: Sequence[str]) -> Embeds:
        seeds = [zlib.crc32(sentence.encode()) for sentence in sentences]
        return np.array([np.random.default_rng(seed).normal(size=48) for seed in seeds], np.float32)
