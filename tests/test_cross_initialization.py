"""Cross Initialization: a start at the text encoder's output, and a course without a bound."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learning_setup import random_images, tiny_model
from tests.tiny_model import XL_DIMS, make_tiny_ldm_model, make_tiny_xl_model
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.errors import LearningError
from trainer.images import TrainingImages
from trainer.initializer import initial_vectors, phrase_vectors, word_norm
from trainer.joint import JointWord, learn_jointly
from trainer.learning import learn
from trainer.model import DiffusionModel, Encoder, load_model
from trainer.options import LearnOptions
from trainer.run import Run

OPTIONS = LearnOptions(
    steps=6, batch_size=2, eval_every=3, initializer_token="red cat", cross_initialization=True
)
# float32 sums of some hundred products in another order.
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    return random_images()


def _padded_ids(encoder: Encoder, phrase: str) -> Tensor:
    tokenizer: Any = encoder.tokenizer
    return tokenizer(
        phrase, padding="max_length", max_length=encoder.max_tokens, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def test_start_is_the_last_hidden_state_after_the_final_norm(model: DiffusionModel) -> None:
    """At the words' own places, as the authors' code takes it from transformers."""
    ids = _padded_ids(model.encoders[0], "red cat")
    expected = model.text_encoder(ids).last_hidden_state[0, 1:3]
    found = phrase_vectors(model, "red cat", 2, cross=True)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    # A word that follows another has heard of it, and a phrase of another length gives its mean.
    alone = phrase_vectors(model, "cat", 1, cross=True)
    assert torch.cosine_similarity(alone[0], expected[1], dim=0) < 0.99
    mean = phrase_vectors(model, "red cat", 1, cross=True)
    torch.testing.assert_close(mean, expected.mean(dim=0, keepdim=True), **TOLERANCE)


@torch.no_grad()
def test_start_of_sdxl_is_before_the_last_layer_without_a_norm(tmp_path: Path) -> None:
    """What the denoiser reads of each: `hidden_states[-2]`."""
    model = load_model(make_tiny_xl_model(tmp_path, max_tokens=40))
    found = phrase_vectors(model, "red cat", 2, cross=True).split(XL_DIMS, dim=1)
    for encoder, part in zip(model.encoders, found, strict=True):
        ids = _padded_ids(encoder, "red cat")
        states = encoder.text_encoder(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(part, states[-2][0, 1:3], **TOLERANCE)


@torch.no_grad()
def test_start_of_latent_diffusion_has_heard_the_padding(tmp_path: Path) -> None:
    model = load_model(make_tiny_ldm_model(tmp_path))
    expected = model.text_encoder(_padded_ids(model.encoders[0], "red cat"))[0][0, 1:3]
    found = phrase_vectors(model, "red cat", 2, cross=True)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
def test_without_a_phrase_the_mean_of_the_vocabulary_goes_through(model: DiffusionModel) -> None:
    """As a token of its own, in a vocabulary that transformers has enlarged."""
    found = phrase_vectors(model, None, 1, cross=True)
    fresh: Any = type(model.text_encoder)(model.text_encoder.config)
    fresh.load_state_dict(model.text_encoder.state_dict())
    (vocabulary, _) = model.token_embedding.shape
    fresh.resize_token_embeddings(vocabulary + 1).weight[vocabulary] = model.token_embedding.mean(0)
    ids = _padded_ids(model.encoders[0], "cat")
    ids[0, 1] = vocabulary
    expected = fresh.eval()(ids).last_hidden_state[0, 1:2]
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_several_vectors_from_one_word_are_told_apart(model: DiffusionModel) -> None:
    vectors = initial_vectors(
        model, initializer_token="cat", num_vectors=2, generator=_generator(), cross=True
    )
    lengths = vectors.norm(dim=1)
    apart = (vectors[0] - vectors[1]).norm()
    assert 0 < apart < 0.02 * lengths.min() * (1 + 1e-6)  # each is moved by 1 %


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_run_starts_there_is_not_shortened_and_ends_finite(
    model: DiffusionModel, images: TrainingImages, optimizer: Any
) -> None:
    options = dataclasses.replace(OPTIONS, optimizer=optimizer)
    first, *_, last = learn(model, images, options)
    start = phrase_vectors(model, "red cat", 1, cross=True)
    assert torch.equal(first.vectors, start)
    norm = word_norm(model)
    assert first.vectors.norm() > 2 * norm and last.vectors.norm() > 2 * norm
    assert math.isfinite(last.loss) and math.isfinite(last.best_evaluation_loss)
    assert not torch.equal(last.vectors, first.vectors)


def test_vectors_that_join_late_start_there_too(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(OPTIONS, num_vectors=3, progressive=True)
    states = list(learn(model, images, options))
    assert torch.equal(states[0].initial_vectors, phrase_vectors(model, "red cat", 3, cross=True))
    assert [len(state.vectors) for state in states] == [1, 1, 2, 2, 3, 3, 3]
    assert (states[-1].vectors.norm(dim=1) > 2 * word_norm(model)).all()


def test_the_images_own_vectors_start_at_the_output_for_the_mean(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(OPTIONS, per_image_tokens=True)
    first, *_, last = learn(model, images, options)
    mean = phrase_vectors(model, None, 1, cross=True)
    apart = (first.vectors[1:] - mean).norm(dim=1)
    # Each is moved by 1 % of its length.
    torch.testing.assert_close(apart, 0.01 * mean.norm().expand(3), rtol=1e-3, atol=0)
    assert torch.equal(first.best_vectors, phrase_vectors(model, "red cat", 1, cross=True))
    assert last.vectors.isfinite().all() and len(last.best_vectors) == 1


def test_words_of_a_joint_run_start_there(model: DiffusionModel, images: TrainingImages) -> None:
    words = [
        JointWord(placeholder_token=f"<{word}>", images=images, initializer_token=word)
        for word in ("cat", "dog")
    ]
    options = dataclasses.replace(OPTIONS, initializer_token=None)
    first, *_, last = learn_jointly(model, words, images, options)
    starts = [phrase_vectors(model, word, 1, cross=True) for word in ("cat", "dog")]
    assert torch.equal(first.vectors, torch.cat(starts))
    assert (last.vectors.norm(dim=1) > 2 * word_norm(model)).all()


def test_a_search_compares_words_and_the_start_is_made_of_the_best(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(
        OPTIONS, initializer_token="auto", initializer_candidates=("cat", "dog", "red cat")
    )
    state = next(learn(model, images, options))
    best = state.initializers[0].word
    assert torch.equal(state.vectors, phrase_vectors(model, best, 1, cross=True))


def test_resume_is_the_same_bit_for_bit(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    identity = RunIdentity.of(model, images, OPTIONS, placeholder_token="<cat>")
    states = list(learn(model, images, OPTIONS))
    write_checkpoint(tmp_path / "checkpoint", states[2], identity)
    state = read_checkpoint(tmp_path / "checkpoint", identity)
    resumed = list(learn(model, images, OPTIONS, resume_from=state))
    for found, wanted in zip(resumed, states[3:], strict=True):
        assert torch.equal(found.vectors, wanted.vectors)
        assert found.evaluation_losses == wanted.evaluation_losses


def test_the_pull_to_the_start_is_the_authors_unless_another_is_given() -> None:
    assert LearnOptions().pull == 0.0
    assert OPTIONS.pull == 1e-5
    assert dataclasses.replace(OPTIONS, regularization=0.0).pull == 0.0
    assert LearnOptions(regularization=0.5).pull == 0.5


def test_a_run_is_pulled_as_its_authors_do(model: DiffusionModel, images: TrainingImages) -> None:
    usual, same, free = (
        list(learn(model, images, dataclasses.replace(OPTIONS, regularization=weight)))
        for weight in (None, 1e-5, 0.0)
    )
    assert torch.equal(usual[-1].vectors, same[-1].vectors)
    assert usual[1].loss == free[1].loss  # where it has not moved yet
    assert usual[2].loss > free[2].loss


def test_the_pull_is_the_gradient_of_the_squared_distance_to_the_start(
    model: DiffusionModel, images: TrainingImages
) -> None:
    """A step with it is one without it whose gradient has that of torch added."""
    plain, pulled = (
        Run.prepare(model, images, dataclasses.replace(OPTIONS, regularization=weight), label="")
        for weight in (0.0, 0.7)
    )
    first = plain.first_state(model)
    away = torch.randn(first.vectors.shape, generator=_generator())
    moved = dataclasses.replace(first, vectors=first.vectors + away)
    leaf = moved.vectors.clone().requires_grad_(True)
    penalty = 0.7 * torch.nn.functional.mse_loss(leaf, first.vectors, reduction="sum")
    penalty.backward()
    assert leaf.grad is not None
    gradient = torch.full_like(away, 0.1)
    expected = plain.after(moved, 1.0 + penalty.item(), gradient + leaf.grad)
    found = pulled.after(moved, 1.0, gradient)
    torch.testing.assert_close(found.vectors, expected.vectors)
    torch.testing.assert_close(found.first_moment, expected.first_moment)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    # The pull is no sign that the denoiser's own gradient has arrived.
    assert pulled.after(moved, 1.0, torch.zeros_like(away)).zero_gradients == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("regularization", -1.0), ("regularization", math.nan), ("warm_start", -1)],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(LearningError, match=f"{name} must be .*at least 0, got {value}"):
        LearnOptions(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "dti"}, "starts longer than any word, and optimizer dti holds"),
        ({"warm_start": 5}, r"and warm_start \(5\) holds a word's length; use one of them"),
    ],
)
def test_what_holds_a_words_length_does_not_go_with_it(options: Any, message: str) -> None:
    with pytest.raises(LearningError, match=message):
        LearnOptions(cross_initialization=True, **options)


def test_a_phrase_that_does_not_fit_is_refused(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(OPTIONS, initializer_token="cat " * 39)
    with pytest.raises(LearningError, match="has 39 tokens, the text encoder 38 places"):
        next(learn(model, images, options))
    longest = phrase_vectors(model, "cat " * 38, 38, cross=True)
    assert longest.shape == (38, model.dims[0]) and longest.isfinite().all()
