"""Learning on a model with two text encoders, from the first vectors to the concept."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_model import XL_DIMS, make_tiny_xl_model
from trainer.fingerprint import model_fingerprint
from trainer.images import TrainingImages
from trainer.initializer import initial_vectors, word_norm
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions
from trainer.splicing import as_concept

OPTIONS = LearnOptions(steps=3, batch_size=2, num_vectors=2, learning_rate=0.5, eval_every=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(make_tiny_xl_model(tmp_path_factory.mktemp("models") / "xl", max_tokens=40))


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    pixels = torch.rand((2, 3, 24, 24), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return TrainingImages(
        pixels=pixels, names=("a", "b"), sha256=("0" * 64, "1" * 64), upscaled=(), skipped=()
    )


def test_vectors_start_from_the_word_in_each_table(model: DiffusionModel) -> None:
    vectors = initial_vectors(
        model, initializer_token="cat", num_vectors=1, generator=torch.Generator()
    )
    for encoder, part in zip(model.encoders, vectors.split(XL_DIMS, dim=1), strict=True):
        (token_id,) = encoder.tokenizer("cat", add_special_tokens=False).input_ids
        row = encoder.token_embedding[token_id]
        torch.testing.assert_close(part[0], row, rtol=0, atol=0)


def test_both_parts_move_and_neither_grows_longer_than_a_word(
    model: DiffusionModel, images: TrainingImages
) -> None:
    first, *_, last = learn(model, images, OPTIONS)
    assert last.vectors.shape == (2, sum(XL_DIMS))
    for encoder, before, after in zip(
        model.encoders,
        first.vectors.split(XL_DIMS, dim=1),
        last.vectors.split(XL_DIMS, dim=1),
        strict=True,
    ):
        assert (after - before).norm(dim=1).min() > 0.01
        # The learning rate is so large that every step goes beyond the limit.
        torch.testing.assert_close(after.norm(dim=1), torch.full((2,), word_norm(encoder)))


def test_a_run_goes_on_as_if_it_had_not_stopped(
    model: DiffusionModel, images: TrainingImages
) -> None:
    states = list(learn(model, images, OPTIONS))
    *_, resumed = learn(model, images, OPTIONS, resume_from=states[1])
    assert torch.equal(resumed.vectors, states[-1].vectors)


def test_the_concept_has_each_encoders_part(model: DiffusionModel) -> None:
    vectors = torch.randn((3, sum(XL_DIMS)), generator=torch.Generator().manual_seed(0))
    concept = as_concept(model, vectors, placeholder_token="<new>")
    assert concept.dims == XL_DIMS
    np.testing.assert_array_equal(np.concatenate(concept.encoders, axis=1), vectors.numpy())


def test_the_second_encoder_is_part_of_the_models_fingerprint(model: DiffusionModel) -> None:
    first, second = model.encoders
    changed: Any = copy.deepcopy(second.text_encoder)
    changed.text_projection.weight.data *= 2
    other = dataclasses.replace(
        model, encoders=(first, dataclasses.replace(second, text_encoder=changed))
    )
    assert model_fingerprint(other) != model_fingerprint(model)
