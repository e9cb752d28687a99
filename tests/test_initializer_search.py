"""The search for an initializer: which words stand, how they are compared, and what comes out."""

from pathlib import Path

import pytest
import torch

from tests import learning_setup
from tests.learning_setup import objective_of
from tests.tiny_model import make_tiny_xl_model
from trainer import initializer_search
from trainer.errors import LearningError
from trainer.images import TrainingImages
from trainer.initializer import phrase_vectors, word_norm
from trainer.initializer_search import (
    FINALISTS,
    RankedWord,
    mean_losses,
    most_promising,
    ranked,
    vocabulary_words,
)
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.objective import Vectors
from trainer.options import LearnOptions
from trainer.updates import shortened

WORDS = ["an", "of", "in", "the", "cat", "dog", "photo", "drawing", "red", "morning"]

# Fixtures.
model_path, model, images = learning_setup.model_path, learning_setup.model, learning_setup.images


def _start(model: DiffusionModel, vectors: Vectors) -> Vectors:
    return shortened(vectors, word_norm(model))


def test_candidates_are_the_words_that_are_one_token(model: DiffusionModel) -> None:
    """The vocabulary has all bytes and parts of words as well, such as "mo" and "orning"."""
    found = vocabulary_words(model)
    assert sorted(found) == sorted(WORDS)
    tokenizer = model.tokenizer
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in found]
    assert ids == sorted(ids) and all(len(one) == 1 for one in ids)


def test_candidates_of_two_encoders_are_words_for_both(tmp_path: Path) -> None:
    xl = load_model(make_tiny_xl_model(tmp_path, max_tokens=40))
    assert sorted(vocabulary_words(xl)) == sorted(WORDS)


def test_loss_of_a_word_is_that_of_learning_from_it(
    model: DiffusionModel, images: TrainingImages
) -> None:
    candidates = ("cat", "red cat", "dog")
    options = LearnOptions(
        steps=1, batch_size=2, initializer_token="auto", initializer_candidates=candidates
    )
    state = next(learn(model, images, options))
    expected: dict[str, float] = {}
    for word in candidates:
        alone = LearnOptions(steps=1, batch_size=2, initializer_token=word)
        first = next(learn(model, images, alone))
        expected[word] = first.initial_evaluation_loss
        if word == state.initializers[0].word:
            assert torch.equal(state.vectors, first.vectors)
    # Samples of different words share a pass: float32 sums in another order.
    assert dict(state.initializers) == pytest.approx(expected, rel=1e-5)
    losses = [loss for _, loss in state.initializers]
    assert losses == sorted(losses)


def test_the_vocabulary_is_searched_where_no_candidates_are_given(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = LearnOptions(steps=1, batch_size=8, num_vectors=2, initializer_token="auto")
    state = next(learn(model, images, options))
    assert len(state.initializers) == FINALISTS
    best = phrase_vectors(model, state.initializers[0].word, 2)
    # Two vectors from one word are nudged apart by 1 % of their length.
    assert torch.cosine_similarity(state.vectors, best).min() > 0.9998
    assert not torch.equal(state.vectors[0], state.vectors[1])


def test_halving_finds_the_word_that_a_full_comparison_finds(
    model: DiffusionModel, images: TrainingImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among 40 vectors of which some are much better: moved along the gradient."""
    objective = objective_of(model, images)
    evaluation = objective.draw_evaluation(32)
    middle = phrase_vectors(model, None, 1)
    _, gradient = objective.loss_and_gradient(middle, evaluation)
    steps = torch.linspace(-3.0, 3.0, 40)[torch.randperm(40, generator=_generator())]
    vectors = middle - steps[:, None, None] * gradient / gradient.norm()
    words = [str(place) for place in range(40)]
    losses = mean_losses(objective, evaluation, vectors, at_once=64)
    order = losses.argsort().tolist()
    tried: list[int] = []
    real = initializer_search.mean_losses

    def counted(*positional: object, **named: object) -> torch.Tensor:
        tried.append(len(positional[2]) * len(positional[1]))  # pyright: ignore
        return real(*positional, **named)  # pyright: ignore

    monkeypatch.setattr(initializer_search, "mean_losses", counted)
    found = ranked(objective, evaluation, words, vectors, at_once=64)
    assert tried == [40 * 4, 10 * 8, 8 * 32]
    assert int(found[0].word) in order[:3]
    assert len(found) == FINALISTS
    for word, loss in found:
        assert loss == pytest.approx(losses[int(word)].item(), rel=1e-5)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_few_candidates_are_all_compared_on_the_whole_batch(
    model: DiffusionModel, images: TrainingImages
) -> None:
    objective = objective_of(model, images)
    evaluation = objective.draw_evaluation(32)
    vectors = torch.stack([phrase_vectors(model, word, 1) for word in WORDS[:3]])
    found = ranked(objective, evaluation, WORDS[:3], vectors, at_once=7)
    expected = [
        RankedWord(word, objective.evaluate(own, evaluation, at_once=32))
        for word, own in zip(WORDS, vectors, strict=False)
    ]
    wanted = sorted(expected, key=lambda one: one.loss)
    assert [word for word, _ in found] == [word for word, _ in wanted]


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_the_most_promising_words_are_those_along_the_gradient(
    model: DiffusionModel,
    images: TrainingImages,
    monkeypatch: pytest.MonkeyPatch,
    num_vectors: int,
) -> None:
    """Against the change of the loss for a small step from the mean towards each word."""
    monkeypatch.setattr(initializer_search, "MAX_CANDIDATES", 4)
    objective = objective_of(model, images, num_vectors=num_vectors)
    evaluation = objective.draw_evaluation(32)

    def start(vectors: Vectors) -> Vectors:
        return _start(model, vectors)

    found = most_promising(model, objective, evaluation, WORDS, start=start, batch_size=5)
    middle = start(phrase_vectors(model, None, num_vectors))
    towards = torch.stack([start(phrase_vectors(model, word, num_vectors)) for word in WORDS])
    # A tenth of the way: far enough for float32 losses to differ, near enough to be straight.
    losses = mean_losses(objective, evaluation, middle + 0.1 * (towards - middle), at_once=64)
    expected = [WORDS[place] for place in losses.argsort().tolist()]
    assert len(found) == 4 and found[0] == expected[0]
    assert set(found) <= set(expected[:5])


def test_a_candidate_without_tokens_is_refused(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = LearnOptions(initializer_token="auto", initializer_candidates=("cat", " "))
    with pytest.raises(LearningError, match="' ' has no tokens"):
        next(learn(model, images, options))
