"""What an image tower adds: words ranked by CLIP, and vectors led to the images before learning."""

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.concepts import read_concept
from tests.learning_setup import image_folder, learn_arguments, random_images, tiny_model
from tests.tiny_model import XL_DIMS, make_tiny_xl_model
from tests.tiny_tower import MEAN, SIDE, STD, load_clip, make_tiny_tower
from trainer import cli, initializer_search, run
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.errors import CheckpointError, Diverged, LearningError
from trainer.image_guide import ImageGuide, spherical_distances, word_similarities
from trainer.image_tower import ImageTower, open_image_towers
from trainer.images import TrainingImages
from trainer.initializer import phrase_vectors, word_norm
from trainer.initializer_search import vocabulary_words
from trainer.learning import learn, learn_together
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions
from trainer.templates import OBJECT_TEMPLATES
from trainer.warm_start import led

OPTIONS = LearnOptions(steps=4, batch_size=2, eval_every=2, warm_start=12)
# float32 sums of some hundred products in another order.
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model(path)
    return path


@pytest.fixture(scope="module")
def model(model_path: Path) -> DiffusionModel:
    return load_model(model_path)


@pytest.fixture(scope="module")
def folder(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tower(tmp_path_factory.mktemp("tower"), model)


@pytest.fixture(scope="module")
def tower(model: DiffusionModel, folder: Path) -> ImageTower:
    (tower,) = open_image_towers([str(folder)], model)
    return tower


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    """Of the size that the tower sees, so that nothing is resized."""
    return sized(random_images(), SIDE)


def sized(images: TrainingImages, side: int) -> TrainingImages:
    levels = torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(2))
    return dataclasses.replace(images, pixels=levels.float() / 127.5 - 1.0)


def _guide(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages, *, num_vectors: int = 1
) -> ImageGuide:
    return ImageGuide.of(tower, model, images, LearnOptions(num_vectors=num_vectors))


def _normalized(images: TrainingImages) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images.pixels + 1) / 2 - mean) / std


# --- ranking words ---


@torch.no_grad()
def _logits(
    model: DiffusionModel, folder: Path, images: TrainingImages, sentences: list[str]
) -> Tensor:
    """Of each sentence, the mean over the images of transformers' logits."""
    clip, pixels = load_clip(folder), _normalized(images)
    ids = [model.tokenizer(sentence, return_tensors="pt").input_ids for sentence in sentences]
    rows = [clip(input_ids=row, pixel_values=pixels).logits_per_image.mean() for row in ids]
    return torch.stack(rows) / clip.logit_scale.exp()


@pytest.mark.parametrize(
    ("learnable_property", "sentence"),
    [("object", "a photo of a {}"), ("style", "a painting in the style of {}")],
)
def test_words_rank_as_in_transformers(
    model: DiffusionModel,
    folder: Path,
    tower: ImageTower,
    images: TrainingImages,
    learnable_property: Any,
    sentence: str,
) -> None:
    words = [*vocabulary_words(model), "red cat", "{}"]
    compare = word_similarities([_guide(model, tower, images)], learnable_property)
    assert compare is not None
    found = compare(words)
    expected = _logits(model, folder, images, [sentence.format(word) for word in words])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert found.argsort().tolist() == expected.argsort().tolist()


def test_the_loss_decides_between_the_words_that_clip_likes_best(
    model: DiffusionModel,
    folder: Path,
    tower: ImageTower,
    images: TrainingImages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(initializer_search, "BY_SIMILARITY", 4)
    options = LearnOptions(steps=1, batch_size=2, initializer_token="auto")
    state = next(learn(model, images, options, towers=[tower]))
    words = vocabulary_words(model)
    logits = _logits(model, folder, images, [f"a photo of a {word}" for word in words])
    best = [words[place] for place in logits.argsort(descending=True).tolist()[:4]]
    assert {word for word, _ in state.initializers} == set(best)
    plain = next(learn(model, images, options))
    losses = dict(plain.initializers)
    for word, loss in state.initializers:
        assert loss == pytest.approx(losses.get(word, loss), rel=1e-5)
    found = [loss for _, loss in state.initializers]
    assert found == sorted(found)
    assert {word for word, _ in plain.initializers} != set(best)


def test_a_candidate_that_clip_cannot_read_is_refused(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages
) -> None:
    options = LearnOptions(
        initializer_token="auto", initializer_candidates=("cat", "cat " * 40), batch_size=2
    )
    with pytest.raises(LearningError, match="has 46 tokens, the encoder .* reads 40"):
        next(learn(model, images, options, towers=[tower]))


# --- the loss of the warm start ---


def test_spherical_distances_are_those_by_arcsin() -> None:
    """As CLIP guidance writes them, in float64, but for vectors that are equal or opposite."""
    generator = torch.Generator().manual_seed(0)
    texts, images = (
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator).double(), dim=1)
        for n in (5, 3)
    )
    expected = (texts[:, None] - images).norm(dim=-1).div(2).arcsin().pow(2).mul(2)
    torch.testing.assert_close(spherical_distances(texts, images), expected)
    leaf = images.clone().requires_grad_(True)
    distances = spherical_distances(leaf, torch.cat([images, -images]))
    assert distances[0, 0] == 0.0
    assert distances[0, 3].item() == pytest.approx(math.pi**2 / 2)
    (gradient,) = torch.autograd.grad(distances.sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_gradient_is_that_of_transformers_with_an_enlarged_vocabulary(
    model: DiffusionModel,
    folder: Path,
    tower: ImageTower,
    images: TrainingImages,
    num_vectors: int,
) -> None:
    vectors = 0.3 * torch.randn((num_vectors, model.dims[0]), generator=_generator())
    loss, gradient = _guide(model, tower, images, num_vectors=num_vectors).loss_and_gradient(
        vectors
    )
    clip, vocabulary = load_clip(folder), len(model.tokenizer)
    new_ids = list(range(vocabulary, vocabulary + num_vectors))
    table = clip.text_model.resize_token_embeddings(vocabulary + num_vectors)
    with torch.no_grad():
        table.weight[new_ids] = vectors
    distances: list[Tensor] = []
    for template in OBJECT_TEMPLATES:
        before = template.removesuffix(" {}")
        ids = model.tokenizer(before).input_ids
        output = clip(
            input_ids=torch.tensor([[*ids[:-1], *new_ids, ids[-1]]]),
            pixel_values=_normalized(images),
        )
        apart = (output.text_embeds - output.image_embeds).norm(dim=1)
        distances.append(2 * (apart / 2).arcsin() ** 2)
    expected = torch.cat(distances).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, table.weight.grad[new_ids], **TOLERANCE)


def test_prompts_in_several_passes_are_those_in_one(
    model: DiffusionModel,
    tower: ImageTower,
    images: TrainingImages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guide = _guide(model, tower, images)
    vectors = 0.3 * torch.randn((1, model.dims[0]), generator=_generator())
    loss, gradient = guide.loss_and_gradient(vectors)
    similarity = guide.similarity(vectors)
    monkeypatch.setattr("trainer.image_guide._AT_ONCE", 2)
    parted, parted_gradient = guide.loss_and_gradient(vectors)
    assert parted == pytest.approx(loss, rel=1e-6)
    assert guide.similarity(vectors) == pytest.approx(similarity, rel=1e-6)
    torch.testing.assert_close(parted_gradient, gradient, **TOLERANCE)


def test_images_count_alike_and_with_their_own_captions_alone(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages
) -> None:
    """The templates for the first two images, one sentence of its own for the third."""
    captioned = dataclasses.replace(images, captions=((), (), ("{} in the morning",)))
    guide = _guide(model, tower, captioned)
    vectors = 0.3 * torch.randn((1, model.dims[0]), generator=_generator())
    count = len(OBJECT_TEMPLATES)
    pairs = torch.empty(count + 1, 3)
    for text, image in itertools.product(range(count + 1), range(3)):
        alone = torch.zeros_like(guide.shares)
        alone[text, image] = 1.0
        pairs[text, image] = dataclasses.replace(guide, shares=alone).similarity(vectors)
    expected = (pairs[:count, 0].mean() + pairs[:count, 1].mean() + pairs[count, 2]) / 3
    assert guide.similarity(vectors) == pytest.approx(expected.item(), rel=1e-5)
    assert pairs.std() > 1e-3


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- the warm start in a run ---


def test_similarity_rises_and_vectors_are_no_longer_than_a_word(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages
) -> None:
    guide, norm = _guide(model, tower, images), word_norm(model)
    start = phrase_vectors(model, "cat", 1)
    few, many = (led(guide, start, steps=steps, norm=norm) for steps in (10, 100))
    assert guide.similarity(start) < guide.similarity(few) < guide.similarity(many)
    assert many.norm() <= norm * (1 + 1e-6)


def test_learning_goes_on_from_the_warm_start_with_the_same_draws(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages
) -> None:
    state = next(learn(model, images, OPTIONS, towers=[tower]))
    cold = next(learn(model, images, dataclasses.replace(OPTIONS, warm_start=0), towers=[tower]))
    assert cold.warmth is None and state.warmth is not None
    before, after = state.warmth
    assert after > before
    assert not torch.equal(state.vectors, cold.vectors)
    assert torch.equal(state.initial_vectors, state.vectors)
    assert torch.equal(state.rng_state, cold.rng_state)
    untowered = next(learn(model, images, dataclasses.replace(OPTIONS, warm_start=0)))
    assert torch.equal(cold.vectors, untowered.vectors)


def test_dti_starts_from_the_warm_start_at_a_words_length(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages
) -> None:
    options = dataclasses.replace(OPTIONS, optimizer="dti")
    state = next(learn(model, images, options, towers=[tower]))
    assert state.vectors.norm().item() == pytest.approx(word_norm(model), rel=1e-6)
    assert state.warmth is not None and state.warmth.after > state.warmth.before


def test_resume_goes_on_bit_for_bit_and_never_warms_again(
    model: DiffusionModel,
    tower: ImageTower,
    images: TrainingImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    identity = RunIdentity.of(model, images, OPTIONS, placeholder_token="<cat>", towers=[tower])
    states = list(learn(model, images, OPTIONS, towers=[tower]))
    write_checkpoint(tmp_path / "checkpoint", states[1], identity)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("the warm start was repeated")

    monkeypatch.setattr(run, "warm_started", again)
    state = read_checkpoint(tmp_path / "checkpoint", identity)
    assert state.warmth == states[0].warmth
    resumed = list(learn(model, images, OPTIONS, towers=[tower], resume_from=state))
    for found, wanted in zip(resumed, states[2:], strict=True):
        assert torch.equal(found.vectors, wanted.vectors)
        assert found.evaluation_losses == wanted.evaluation_losses


def test_a_checkpoint_of_another_tower_is_refused(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages, tmp_path: Path
) -> None:
    other = dataclasses.replace(tower, identity="SHA-256 of another")
    kept, asked = (
        RunIdentity.of(model, images, OPTIONS, placeholder_token="<cat>", towers=[one])
        for one in (tower, other)
    )
    state = next(learn(model, images, OPTIONS, towers=[tower]))
    write_checkpoint(tmp_path / "checkpoint", state, kept)
    with pytest.raises(CheckpointError, match="the image towers differ"):
        read_checkpoint(tmp_path / "checkpoint", asked)


def test_a_warm_start_without_a_tower_is_refused(
    model: DiffusionModel, images: TrainingImages
) -> None:
    with pytest.raises(LearningError, match="concept 1 of 2: warm_start=12 needs the image tower"):
        next(learn_together(model, [images, images], [OPTIONS, OPTIONS]))


def test_a_text_half_that_overflows_is_said(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages
) -> None:
    guide = _guide(model, tower, images)
    broken = dataclasses.replace(guide, images=guide.images * torch.nan)
    with pytest.raises(Diverged, match="warm start, step 1: loss nan with the text half of"):
        led(broken, phrase_vectors(model, "cat", 1), steps=3, norm=1.0)


@pytest.mark.parametrize("place", [0, 1])
def test_of_two_text_encoders_only_that_with_a_tower_is_led(tmp_path: Path, place: int) -> None:
    model = load_model(make_tiny_xl_model(tmp_path / "xl", max_tokens=40))
    path = make_tiny_tower(tmp_path / "tower", model, encoder=place)
    images = sized(random_images(), 24)
    towers = open_image_towers([str(path)], model)
    state = next(learn(model, images, OPTIONS, towers=towers))
    cold = next(learn(model, images, dataclasses.replace(OPTIONS, warm_start=0)))
    assert state.warmth is not None and state.warmth.after > state.warmth.before
    parts = zip(*(one.vectors.split(XL_DIMS, dim=1) for one in (state, cold)), strict=True)
    # Up to rounding: a vector that was shortened to a word's length is so once more.
    still = [torch.allclose(warm, cold, rtol=1e-6, atol=0) for warm, cold in parts]
    assert still == [place == 1, place == 0]


def test_only_the_words_own_vectors_are_led(
    model: DiffusionModel, tower: ImageTower, images: TrainingImages
) -> None:
    """As without the images' own, which stay where they start."""
    options = dataclasses.replace(OPTIONS, num_vectors=2, per_image_tokens=True)
    state = next(learn(model, images, options, towers=[tower]))
    cold = next(learn(model, images, dataclasses.replace(options, warm_start=0)))
    plain = dataclasses.replace(options, per_image_tokens=False)
    alone = next(learn(model, images, plain, towers=[tower]))
    assert torch.equal(state.best_vectors, alone.vectors)
    assert state.warmth == alone.warmth
    assert (state.vectors[:2] != cold.vectors[:2]).any(dim=1).all()
    assert torch.equal(state.vectors[2:], cold.vectors[2:])
    assert torch.equal(state.initial_vectors, state.vectors)


# --- the command ---


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


def _arguments(model: Path, folder: Path, *more: str) -> argparse.Namespace:
    output = folder.parent / "cat.safetensors"
    return learn_arguments(
        model, output, folder, "--placeholder-token", "<cat>", "--steps", "2", *more
    )


def test_the_concept_says_how_it_was_warmed(
    model_path: Path, folder: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(
        model_path, picture_folder, "--image-tower", str(folder), "--warm-start", "20"
    )
    assert cli.run(arguments) == 0
    metadata = read_concept(arguments.output).metadata
    assert metadata["warm_start"] == "20"
    (identity,) = json.loads(metadata["image_towers"]).values()
    assert identity.startswith("SHA-256 ")
    before, after = (metadata[f"{name}_similarity"] for name in ("initial", "warm"))
    assert float(after) > float(before)
    printed = capsys.readouterr().out
    assert f"images {float(before):.4f} -> {float(after):.4f}" in printed
    assert "no image tower" not in printed


def test_without_a_tower_what_needs_one_is_skipped_and_said(
    model_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(model_path, picture_folder)
    assert cli.run(arguments) == 0
    plain = read_concept(arguments.output)
    assert "no image tower" not in capsys.readouterr().out
    assert cli.run(_arguments(model_path, picture_folder, "--warm-start", "20")) == 0
    printed = capsys.readouterr().out
    assert "no image tower: no warm start; --image-tower names the model's CLIP\n" in printed
    skipped = read_concept(arguments.output)
    assert skipped.concept_id == plain.concept_id
    assert skipped.metadata["warm_start"] == "0"
    searched = ["--initializer-token", "auto", "--initializer-candidates", "cat,dog"]
    assert cli.run(_arguments(model_path, picture_folder, *searched)) == 0
    assert "no image tower: initializers are compared by the loss alone;" in capsys.readouterr().out


def test_a_tower_that_nothing_asks_is_refused(model_path: Path, picture_folder: Path) -> None:
    arguments = _arguments(model_path, picture_folder, "--image-tower", "/nowhere")
    with pytest.raises(LearningError, match="--image-tower does nothing without --warm-start"):
        cli.run(arguments)


def test_each_of_several_words_is_warmed(
    model_path: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--concept=<{name}>={image_folder(tmp_path / name)}" for name in ("one", "two")]
    more = ["--image-tower", folder, "--warm-start", "5", *words]
    assert cli.run(learn_arguments(model_path, tmp_path / "out", *more)) == 0
    printed = capsys.readouterr().out
    for name in ("one", "two"):
        metadata = read_concept(tmp_path / "out" / f"{name}.safetensors").metadata
        assert float(metadata["warm_similarity"]) > float(metadata["initial_similarity"])
        assert f"<{name}>: warm start: similarity of prompts and images" in printed
