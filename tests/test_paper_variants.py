"""The paper's variants: vectors that join late, a pull to the start, a vector for each image."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learning_setup import random_images, tiny_model
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.errors import LearningError
from trainer.images import TrainingImages
from trainer.initializer import phrase_vectors, word_norm
from trainer.learning import learn
from trainer.material import losses_and_gradients
from trainer.model import DiffusionModel
from trainer.objective import Objective
from trainer.options import LearnOptions
from trainer.per_image_tokens import OWN_SHARE, PerImageTokens
from trainer.run import LearnState
from trainer.splicing import TemplatePrompts
from trainer.templates import OBJECT_TEMPLATES

OPTIONS = LearnOptions(steps=6, batch_size=2, eval_every=3, learning_rate=3e-3)
PROGRESSIVE = dataclasses.replace(OPTIONS, num_vectors=3, progressive=True)
VARIANTS = {
    "progressive": PROGRESSIVE,
    "regularized": dataclasses.replace(OPTIONS, regularization=0.5),
    "per-image tokens": dataclasses.replace(OPTIONS, num_vectors=2, per_image_tokens=True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    return random_images()


def _states(
    model: DiffusionModel, images: TrainingImages, options: LearnOptions
) -> list[LearnState]:
    return list(learn(model, images, options))


def _tensors(state: LearnState) -> dict[str, Tensor]:
    values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


# --- all of them ---


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_resumed_from_any_checkpoint_gives_the_same_bits(
    model: DiffusionModel,
    images: TrainingImages,
    tmp_path: Path,
    options: LearnOptions,
) -> None:
    whole = _states(model, images, options)
    identity = RunIdentity.of(model, images, options, placeholder_token="<cat>")
    for at in (1, 4):  # in a progressive run before a vector joins, and when one has just joined
        write_checkpoint(tmp_path / "checkpoint", whole[at], identity)
        state = read_checkpoint(tmp_path / "checkpoint", identity)
        rest = list(learn(model, images, options, resume_from=state))
        assert [state.step for state in rest] == list(range(at + 1, 7))
        for name, tensor in _tensors(whole[-1]).items():
            assert torch.equal(_tensors(rest[-1])[name], tensor), (at, name)
        for name in ("evaluation_losses", "best_evaluation_loss", "best_step", "loss"):
            assert getattr(rest[-1], name) == getattr(whole[-1], name)


@pytest.mark.parametrize("changed", ["progressive", "regularization", "per_image_tokens"])
def test_a_checkpoint_is_of_its_variant(
    model: DiffusionModel, images: TrainingImages, changed: str
) -> None:
    options = dataclasses.replace(OPTIONS, num_vectors=2)
    other = dataclasses.replace(options, **{changed: True})
    identities = [
        RunIdentity.of(model, images, one, placeholder_token="<cat>") for one in (options, other)
    ]
    (difference,) = identities[0].differences(identities[1])
    assert difference.startswith(f"{changed} is ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progressive": True}, "at least 2 vectors.* num_vectors is 1, steps 400"),
        ({"progressive": True, "num_vectors": 3, "steps": 2}, "num_vectors is 3, steps 2"),
        ({"progressive": True, "num_vectors": 2, "stop": "dvar"}, "stop must be 'steps'"),
        (
            {"progressive": True, "num_vectors": 2, "per_image_tokens": True},
            "cannot be combined",
        ),
        (
            {"progressive": True, "num_vectors": 2, "warm_start": 5},
            r"warm_start \(5\) leads all vectors at once",
        ),
        ({"regularization": -0.1}, "finite and at least 0, got -0.1"),
        ({"regularization": math.nan}, "got nan"),
        ({"regularization": math.inf}, "got inf"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LearningError, match=message):
        LearnOptions(**options)


# --- progressive extension ---


@pytest.mark.parametrize(
    ("steps", "num_vectors"), [(6000, 3), (6, 3), (7, 3), (400, 2), (5, 5), (9, 4)]
)
def test_vectors_join_at_equal_parts_of_the_run(steps: int, num_vectors: int) -> None:
    options = LearnOptions(steps=steps, num_vectors=num_vectors, progressive=True)
    joined = [options.joined_at(row) for row in range(num_vectors)]
    assert joined == [math.ceil(row * steps / num_vectors) for row in range(num_vectors)]
    assert joined[0] == 0 and joined[-1] < steps
    if steps == 6000:
        assert joined == [0, 2000, 4000]  # as in the paper


def test_vectors_join_as_the_initializer_and_are_then_judged(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(PROGRESSIVE, initializer_token="cat")
    states = _states(model, images, options)
    assert [len(state.vectors) for state in states] == [1, 1, 2, 2, 3, 3, 3]
    word = phrase_vectors(model, "cat", 1)
    start = word * min(1.0, word_norm(model) / float(word.norm()))
    for step, row in ((2, 1), (4, 2)):
        torch.testing.assert_close(states[step].vectors[row], start[0], rtol=1e-6, atol=0)
        assert not states[step].first_moment[row].any()
        assert states[step].evaluation_loss is not None
    assert len(states[-1].evaluation_losses) == 1 + 2 + 2  # joined at 2 and 4; every third step


@pytest.mark.parametrize(("last_losses", "best"), [((0.6, 0.9, 0.95), 4), ((0.6, 0.5, 0.8), 5)])
def test_the_best_vectors_are_of_those_with_all(
    model: DiffusionModel,
    images: TrainingImages,
    monkeypatch: pytest.MonkeyPatch,
    last_losses: tuple[float, ...],
    best: int,
) -> None:
    """Fewer vectors that had a lower loss are not the result; the evaluations are made up."""
    evaluations = iter((1.0, 0.1, 0.4, 0.3, *last_losses))
    monkeypatch.setattr(Objective, "evaluate", lambda *_, **__: next(evaluations))
    states = _states(model, images, dataclasses.replace(PROGRESSIVE, eval_every=1))
    assert [state.best_step for state in states[:5]] == [0, 1, 2, 3, 4]
    last = states[-1]
    assert last.best_step == best
    assert last.best_evaluation_loss == last_losses[best - 4]
    assert torch.equal(last.best_vectors, states[best].vectors)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "dti"])
def test_the_first_part_is_a_whole_run_of_one_vector(
    model: DiffusionModel, images: TrainingImages, optimizer: Any
) -> None:
    """Same draws, same rates, same bits, until the second vector joins."""
    told = dataclasses.replace(OPTIONS, optimizer=optimizer, initializer_token="cat")
    alone = _states(model, images, dataclasses.replace(told, steps=3))
    grown = _states(
        model, images, dataclasses.replace(told, steps=6, num_vectors=2, progressive=True)
    )
    for one, other in zip(alone, grown[:4], strict=True):
        assert torch.equal(one.vectors, other.vectors[:1])
        assert torch.equal(one.rng_state, other.rng_state)
        assert one.loss == other.loss or math.isnan(one.loss)
    assert alone[0].evaluation_losses == grown[0].evaluation_losses


def test_the_last_part_is_a_run_of_all_vectors(
    model: DiffusionModel, images: TrainingImages
) -> None:
    """With a rule that remembers nothing a plain run goes on from where all have joined."""
    grown = dataclasses.replace(PROGRESSIVE, optimizer="dti")
    states = _states(model, images, grown)
    plain = dataclasses.replace(grown, progressive=False)
    rest = list(learn(model, images, plain, resume_from=states[4]))
    for one, other in zip(rest, states[5:], strict=True):
        # Row by row or all at once: sums over a row in another order.
        torch.testing.assert_close(one.vectors, other.vectors, rtol=1e-5, atol=1e-6)


def test_a_late_vector_takes_first_steps_of_adam(
    model: DiffusionModel, images: TrainingImages
) -> None:
    """PyTorch's Adam with a parameter for each vector, which counts the steps it has had itself."""
    options = dataclasses.replace(
        OPTIONS, num_vectors=2, progressive=True, optimizer="adamw", initializer_token="cat"
    )
    states = _states(model, images, options)
    parameters = [row[None].clone().requires_grad_(True) for row in states[0].initial_vectors]
    optimizers = [torch.optim.AdamW([one], lr=options.rate) for one in parameters]
    texts = OBJECT_TEMPLATES
    plain = [
        dataclasses.replace(
            PerImageTokens.of(model, images, options).word,
            prompts=TemplatePrompts.lay_out(model, texts, count),
        )
        for count in (1, 2)
    ]
    generator = torch.Generator()
    generator.set_state(states[0].rng_state)
    for state in states[1:]:
        present = parameters[: 1 if state.step <= 3 else 2]
        objective = plain[len(present) - 1]
        batch = objective.draw(options.batch_size, generator)
        _, gradient = objective.loss_and_gradient(torch.cat(present).detach(), batch)
        for one, optimizer, own in zip(present, optimizers, gradient, strict=False):
            one.grad = own[None]
            optimizer.step()
        expected = torch.cat(parameters[: len(state.vectors)]).detach()
        # PyTorch's Adam orders the bias corrections differently: a few ulp a step.
        torch.testing.assert_close(state.vectors, expected, rtol=1e-4, atol=1e-6)


def test_each_part_of_the_run_has_its_half_cosine() -> None:
    options = LearnOptions(steps=6, num_vectors=3, progressive=True)
    rates = [options.rate_at(step) / options.rate for step in range(6)]
    assert rates == pytest.approx([1.0, 0.5] * 3)


# --- the pull to the start ---


def test_regularized_gradient_is_that_of_the_written_loss(
    model: DiffusionModel, images: TrainingImages
) -> None:
    """Loss and gradient of each step against autograd of loss + w mean_j |v_j - c_j|^2."""
    weight = 0.7
    options = dataclasses.replace(
        OPTIONS, num_vectors=2, optimizer="adamw", regularization=weight, initializer_token="cat"
    )
    states = _states(model, images, options)
    objective = PerImageTokens.of(model, images, options).word
    generator = torch.Generator()
    generator.set_state(states[0].rng_state)
    for before, after in zip(states[:-1], states[1:], strict=True):
        batch = objective.draw(options.batch_size, generator)
        leaf = before.vectors.clone().requires_grad_(True)
        distances = ((leaf - before.initial_vectors) ** 2).sum(dim=1)
        loss = objective.losses(leaf, batch).mean() + weight * distances.mean()
        loss.backward()
        assert leaf.grad is not None
        # float32 sums in another order.
        assert after.loss == pytest.approx(loss.item(), rel=1e-5)
        assert after.grad_norm == pytest.approx(leaf.grad.norm().item(), rel=1e-5)
        first = (after.first_moment - 0.9 * before.first_moment) / 0.1
        scale = leaf.grad.abs().max().item()
        torch.testing.assert_close(first, leaf.grad, rtol=0, atol=1e-4 * scale)
    assert float((states[-1].vectors - states[0].vectors).norm()) > 0.01  # the pull was felt


def test_evaluation_has_no_pull_in_it(model: DiffusionModel, images: TrainingImages) -> None:
    states = _states(model, images, dataclasses.replace(OPTIONS, regularization=100.0))
    plain = PerImageTokens.of(model, images, OPTIONS)
    expected = plain.word.evaluate(states[-1].vectors, plain.fixed, at_once=8)
    assert states[-1].evaluation_loss == pytest.approx(expected, rel=1e-6)


def test_a_strong_pull_keeps_the_word_near_its_start(
    model: DiffusionModel, images: TrainingImages
) -> None:
    def distance(weight: float) -> float:
        options = dataclasses.replace(
            OPTIONS, steps=10, eval_every=10, optimizer="adamw", learning_rate=0.02
        )
        states = _states(model, images, dataclasses.replace(options, regularization=weight))
        return float((states[-1].vectors - states[0].vectors).norm())

    assert distance(10.0) < 0.3 * distance(0.0)


# --- per-image tokens ---


def _per_image(model: DiffusionModel, images: TrainingImages, **options: Any) -> PerImageTokens:
    told = dataclasses.replace(OPTIONS, per_image_tokens=True, **options)
    return PerImageTokens.of(model, images, told)


def test_an_images_own_vector_has_gradient_from_it_alone(
    model: DiffusionModel, images: TrainingImages
) -> None:
    material = _per_image(model, images, num_vectors=2)
    vectors = 0.3 * torch.randn((5, 24), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    shown: set[int] = set()
    for _ in range(12):
        parts = material.draw(3, generator, num_vectors=5)
        described = [image for part in parts[-1:] for image in part.batch.images.tolist()]
        if parts[-1].objective is material.word:
            described = []
        ((_, gradient),) = losses_and_gradients([(vectors, parts)], max_rows=99)
        moved = [image for image in range(3) if gradient[2 + image].any()]
        assert moved == sorted(set(described))
        assert gradient[:2].any(dim=1).all()
        shown |= set(described)
    assert shown == {0, 1, 2}


def test_loss_is_the_mean_over_both_kinds_of_sentences(
    model: DiffusionModel, images: TrainingImages
) -> None:
    """Against each sample alone, its vectors put together by hand."""
    material = _per_image(model, images)
    vectors = 0.3 * torch.randn((4, 24), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    while len(parts := material.draw(8, generator, num_vectors=4)) < 2:
        pass
    expected: list[float] = []
    for part in parts:
        for row, image in enumerate(part.batch.images.tolist()):
            own = vectors[[0, 1 + image]] if part.objective is material.with_own else vectors[:1]
            sample = part.batch.take(torch.tensor([row]))
            expected.append(part.objective.losses(own, sample).item())
    ((loss, _),) = losses_and_gradients([(vectors, parts)], max_rows=99)
    assert len(expected) == 8
    assert loss == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_sentences_with_both_say_the_word_then_the_images_own(model: DiffusionModel) -> None:
    prompts = TemplatePrompts.lay_out(model, ["a photo of {} with {}", "a {} with {}"], 2, 1)
    # Behind BOS "a photo of" or "a", then "with" in four letters.
    assert prompts.slots.tolist() == [[4, 5, 10], [2, 3, 8]]


def test_a_quarter_of_the_samples_has_both(model: DiffusionModel, images: TrainingImages) -> None:
    material = _per_image(model, images)
    parts = material.draw(4000, torch.Generator().manual_seed(0), num_vectors=4)
    assert [part.objective for part in parts] == [material.word, material.with_own]
    # 4,000 draws of a quarter: a deviation of 27; six of them.
    assert len(parts[1]) == pytest.approx(4000 * OWN_SHARE, abs=6 * 27)
    assert sum(map(len, parts)) == 4000


def test_images_own_vectors_are_dropped_from_the_result(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(OPTIONS, num_vectors=2, per_image_tokens=True)
    states = _states(model, images, options)
    assert states[-1].vectors.shape == (2 + 3, 24)
    for state in states:
        assert state.best_vectors.shape == state.word_vectors.shape == (2, 24)
    material = PerImageTokens.of(model, images, options)
    expected = material.word.evaluate(states[-1].word_vectors, material.fixed, at_once=8)
    assert states[-1].evaluation_loss == pytest.approx(expected, rel=1e-6)


def test_regularization_leaves_the_images_own_vectors_free(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(
        OPTIONS, per_image_tokens=True, regularization=1e4, optimizer="adamw", steps=1
    )
    first, last = _states(model, images, options)
    away = dataclasses.replace(first, vectors=first.vectors + 0.1)
    (pulled,) = learn(model, images, options, resume_from=away)
    assert pulled.first_moment[0].abs().min() > 1e3 * pulled.first_moment[1:].abs().max()
    assert not torch.equal(last.vectors, first.vectors)
