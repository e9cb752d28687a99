"""What is judged, with what, and on a model that is arithmetic."""

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.concepts import Concept, write_concept
from engine.pipeline import Pipeline
from engine.requests import Limits, RgbImage
from tests.fakes import DIM, FakeDenoiser, make_pipeline
from trainer import evaluate_cli
from trainer.encoders import Embeds, EncoderDescription
from trainer.evaluation import DrawingOptions
from trainer.evaluation_prompts import Prompt, PromptSet
from trainer.evaluation_subjects import Subject, read_subjects

SIZE = 64  # pixels of the fake model's pictures
EMBED_DIM = 8 * 8 * 3


class ColourEncoder:
    """Pictures as 8 x 8 patches of colour; sentences as noise of their own."""

    def __init__(self, *, reads_text: bool = True, name: str = "colours") -> None:
        self.seen: list[RgbImage] = []
        self.description = EncoderDescription(
            name=name,
            kind="clip" if reads_text else "dino",
            identity="none",
            image_size=SIZE,
            reads_text=reads_text,
            judges="colours",
        )

    def image_embeds(self, images: Sequence[RgbImage]) -> Embeds:
        self.seen += images
        levels = np.stack(images).reshape(-1, 8, SIZE // 8, 8, SIZE // 8, 3) / 255.0
        return (levels.mean(axis=(2, 4)) - 0.5).reshape(-1, EMBED_DIM).astype(np.float32)

    def text_embeds(self, sentences: Sequence[str]) -> Embeds:
        seeds = [zlib.crc32(sentence.encode()) for sentence in sentences]
        vectors = [np.random.default_rng(seed).normal(size=EMBED_DIM) for seed in seeds]
        return np.array(vectors, np.float32)


PROMPTS = PromptSet(
    source="test",
    prompts=(
        Prompt(template="photo of {}", kind="likeness"),
        Prompt(template="{} red", kind="style"),
        Prompt(template="{} blurry", kind="style"),
    ),
)


OPTIONS = DrawingOptions(
    sampler="ddim", num_inference_steps=2, guidance_scale=3.0, num_samples=3, seeds=(0, 5)
)


def make_concept(
    token: str = "<x>", *, seed: int = 0, dim: int = DIM, word: str = "cat"
) -> Concept:
    # Large, so that one word among the fake encoder's sixteen positions shows in the picture.
    vectors = np.random.default_rng(seed).normal(0, 10, (1, dim)).astype(np.float32)
    metadata = {"initializer_token": word} if word else {}
    return Concept(placeholder_token=token, learned_embeddings=vectors, metadata=metadata)


@pytest.fixture
def pipeline() -> Pipeline:
    return make_pipeline(FakeDenoiser(), limits=Limits(max_images_per_request=1000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training images, the second with its subject in the left half."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(2):
        levels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        image = Image.fromarray(levels)
        if seed:
            alpha = np.zeros((SIZE, SIZE), np.uint8)
            alpha[:, : SIZE // 2] = 255
            image.putalpha(Image.fromarray(alpha))
        image.save(folder / f"{seed}.png")
    return folder


def write_file(folder: Path, concept: Concept, name: str = "x.safetensors") -> Path:
    write_concept(concept, path := folder / name)
    return path


def read_subject(folder: Path, concept: Concept, *class_words: str) -> Subject:
    path = write_file(folder.parent, concept)
    return read_subjects([str(path)], [folder], class_words, size=SIZE)[0]


@pytest.fixture
def command(
    pipeline: Pipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "list[str]":
    """A command line that works, on the fake model and encoders."""
    encoders = {"colours": ColourEncoder(), "dino": ColourEncoder(reads_text=False, name="dino")}
    monkeypatch.setattr(Pipeline, "open", lambda *_, **__: pipeline)
    monkeypatch.setattr(evaluate_cli, "open_encoder", lambda name, **_: encoders[name])
    path = tmp_path / "prompts.txt"
    path.write_text("[likeness]\nphoto of {}\n[style]\n{} red\n{} blurry\n")
    return [
        str(write_file(tmp_path, make_concept())), "--bundle", "fake", "--images", str(folder),
        "--output", str(tmp_path / "out"), "--encoder", "colours", "--prompts", str(path),
        "--num-samples", "2", "--num-inference-steps", "2", "--seeds", "0,1",
    ]  # fmt: skip


def run_command(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    evaluate_cli.add_arguments(parser)
    return evaluate_cli.run(parser.parse_args(words))
