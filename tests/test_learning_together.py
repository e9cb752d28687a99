"""Several concepts in one run: each becomes what it would become alone."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.learning_setup import left_half, objective_of, random_images, tiny_model
from tests.tiny_model import XL_DIMS, make_tiny_xl_model
from trainer.errors import Diverged
from trainer.images import TrainingImages
from trainer.learning import learn, learn_together
from trainer.material import Part, losses_and_gradients
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions

# What is meant to differ between concepts differs: length, seed, rule, end, evaluations.
OPTIONS = (
    LearnOptions(steps=6, batch_size=2, eval_every=2, optimizer="dti"),
    LearnOptions(steps=4, batch_size=3, eval_every=3, num_vectors=2, seed=5),
    LearnOptions(steps=5, batch_size=2, eval_every=2, optimizer="adamw", initializer_token="cat"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def images() -> list[TrainingImages]:
    captioned = dataclasses.replace(random_images(2, seed=3), captions=(("red {}",), ()))
    return [random_images(3, seed=1), left_half(random_images(4, seed=2), masked=(1, 2)), captioned]


@pytest.mark.parametrize("max_rows", [64, 4, 1])
def test_a_concept_in_company_is_the_concept_alone(
    model: DiffusionModel, images: list[TrainingImages], max_rows: int
) -> None:
    together = list(learn_together(model, images, OPTIONS, max_rows=max_rows))
    assert [tuple(state.step for state in states) for states in together] == [
        (0, 0, 0),
        (1, 1, 1),
        (2, 2, 2),
        (3, 3, 3),
        (4, 4, 4),
        (5, 4, 5),
        (6, 4, 5),
    ]
    for place, (own, options) in enumerate(zip(images, OPTIONS, strict=True)):
        alone = list(learn(model, own, options))
        for states, expected in zip(together, alone, strict=False):
            found = states[place]
            # Matrix products of another number of rows sum in another order: 1e-7 of a gradient,
            # which Adam divides by its own size; six steps of 0.003 to 0.04.
            torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=1e-4)
            assert torch.equal(found.rng_state, expected.rng_state)
            assert found.best_step == expected.best_step
            assert found.evaluation_losses == pytest.approx(expected.evaluation_losses, rel=1e-5)


def test_each_concept_has_its_own_loss_and_gradient(
    model: DiffusionModel, images: list[TrainingImages]
) -> None:
    runs: list[tuple[Tensor, list[Part]]] = []
    for place, own in enumerate(images):
        objective = objective_of(model, own, num_vectors=place + 1)
        generator = torch.Generator().manual_seed(place)
        vectors = 0.3 * torch.randn((place + 1, model.dims[0]), generator=generator)
        batch = objective.draw(place + 2, generator)
        runs.append((vectors, [Part(objective=objective, batch=batch)]))
    for (vectors, (part,)), (loss, gradient) in zip(
        runs, losses_and_gradients(runs, max_rows=99), strict=True
    ):
        expected, wanted = part.objective.loss_and_gradient(vectors, part.batch)
        # float32 sums in another order.
        assert loss == pytest.approx(expected, rel=1e-5)
        scale = wanted.abs().max().item()
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * scale)


def test_a_concept_that_is_nan_does_not_touch_the_others(
    model: DiffusionModel, images: list[TrainingImages]
) -> None:
    """It is rolled back, and its company goes on as if it had not been there."""
    options = [LearnOptions(steps=3, batch_size=2, seed=seed) for seed in (0, 1)]
    first, other = (next(learn(model, images[place], options[place])) for place in (0, 1))
    lost = dataclasses.replace(first, vectors=torch.full_like(first.vectors, math.nan))
    given = [lost, other]
    together = list(learn_together(model, images[:2], options, resume_from=given))
    alone = list(learn(model, images[1], options[1], resume_from=other))
    assert [(one.step, one.rollbacks) for one, _ in together] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    for states, expected in zip(together, alone, strict=False):
        torch.testing.assert_close(states[1].vectors, expected.vectors, rtol=0, atol=1e-4)


def test_two_encoders_learn_in_company(tmp_path: Path) -> None:
    model = load_model(make_tiny_xl_model(tmp_path, max_tokens=40))
    options = [LearnOptions(steps=2, batch_size=2, seed=seed) for seed in (0, 1)]
    images: list[TrainingImages] = []
    for seed in (1, 2):
        pixels = torch.rand((2, 3, 24, 24), generator=torch.Generator().manual_seed(seed))
        images.append(dataclasses.replace(random_images(2, seed=seed), pixels=pixels * 2 - 1))
    *_, together = learn_together(model, images, options)
    for own, told, found in zip(images, options, together, strict=True):
        *_, alone = learn(model, own, told)
        assert found.vectors.shape == (1, sum(XL_DIMS))
        torch.testing.assert_close(found.vectors, alone.vectors, rtol=0, atol=1e-4)  # as above


def test_concepts_go_on_from_different_steps(
    model: DiffusionModel, images: list[TrainingImages]
) -> None:
    alone = [list(learn(model, own, told)) for own, told in zip(images, OPTIONS, strict=True)]
    given = [alone[0][4], alone[1][-1], None]
    steps = [
        tuple(state.step for state in states)
        for states in learn_together(model, images, OPTIONS, resume_from=given)
    ]
    assert steps == [(4, 4, 0), (5, 4, 1), (6, 4, 2), (6, 4, 3), (6, 4, 4), (6, 4, 5)]


def test_a_concept_that_cannot_start_is_named(
    model: DiffusionModel, images: list[TrainingImages]
) -> None:
    broken = dataclasses.replace(images[1], pixels=torch.full_like(images[1].pixels, math.nan))
    with pytest.raises(Diverged, match="^concept 2 of 3: step 0: evaluation loss nan"):
        list(learn_together(model, [images[0], broken, images[2]], OPTIONS))
