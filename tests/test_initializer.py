"""Where the vectors start, and how long a word is."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import learning_setup
from tests.learning_setup import OPTIONS
from trainer.errors import LearningError
from trainer.images import TrainingImages
from trainer.initializer import initial_vectors, word_norm
from trainer.learning import learn
from trainer.model import DiffusionModel
from trainer.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

# Fixtures.
model_path, model, images = learning_setup.model_path, learning_setup.model, learning_setup.images


def _initial(model: DiffusionModel, text: str | None, num_vectors: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return initial_vectors(
        model, initializer_token=text, num_vectors=num_vectors, generator=generator
    )


def _row(model: DiffusionModel, word: str) -> Tensor:
    (token_id,) = model.tokenizer(word, add_special_tokens=False).input_ids
    return model.token_embedding[token_id]


@pytest.mark.parametrize("word", ["cat", "dog", "red", "morning"])
def test_one_word_starts_as_that_word(model: DiffusionModel, word: str) -> None:
    torch.testing.assert_close(_initial(model, word, 1)[0], _row(model, word), rtol=0, atol=0)


@pytest.mark.parametrize("word", ["cat", "dog", "red", "morning"])
def test_learning_starts_no_longer_than_a_word_usually_is(
    model: DiffusionModel, images: TrainingImages, word: str
) -> None:
    options = dataclasses.replace(OPTIONS, initializer_token=word)
    row = _row(model, word)
    expected = row * min(1.0, word_norm(model) / row.norm().item())
    torch.testing.assert_close(next(learn(model, images, options)).vectors[0], expected)


def test_length_of_a_word_is_the_median_over_the_words_of_templates(model: DiffusionModel) -> None:
    words = {word for t in OBJECT_TEMPLATES + STYLE_TEMPLATES for word in t.split()} - {"{}"}
    ids = {i for w in words for i in model.tokenizer(w, add_special_tokens=False).input_ids}
    expected = np.median(model.token_embedding[sorted(ids)].norm(dim=1).numpy())
    # torch takes the lower of two middle values, numpy their mean: neighbours among some 40 norms.
    assert word_norm(model) == pytest.approx(expected, rel=0.02)


def test_phrase_of_as_many_tokens_gives_one_each(model: DiffusionModel) -> None:
    vectors = _initial(model, "red cat", 2)
    for vector, word in zip(vectors, ("red", "cat"), strict=True):
        # The nudge is 1 % of the length: the cosine falls by 1e-4 at most.
        assert torch.cosine_similarity(vector, _row(model, word), dim=0) > 0.9998


def test_other_phrase_gives_its_mean_to_distinct_vectors(model: DiffusionModel) -> None:
    mean = (_row(model, "red") + _row(model, "cat")) / 2
    vectors = _initial(model, "red cat", 3)
    for vector in vectors:
        assert torch.cosine_similarity(vector, mean, dim=0) > 0.9998
    assert torch.pdist(vectors).min() > 0


def test_no_phrase_starts_at_the_mean_of_the_vocabulary(model: DiffusionModel) -> None:
    mean = model.token_embedding.mean(dim=0)
    assert torch.cosine_similarity(_initial(model, None, 1)[0], mean, dim=0) > 0.9998


@pytest.mark.parametrize("text", ["", "   "])
def test_phrase_without_tokens_is_refused(model: DiffusionModel, text: str) -> None:
    with pytest.raises(LearningError, match="has no tokens"):
        _initial(model, text, 1)
