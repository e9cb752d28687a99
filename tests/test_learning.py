"""Learning: the step, the choice, what is never touched, and what ends a run."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import learning_setup
from tests.learning_setup import OPTIONS, SIZE, identity_of, last_state
from trainer.checkpoints import read_checkpoint, write_checkpoint
from trainer.errors import Diverged, LearningError, NoGradient
from trainer.images import TrainingImages
from trainer.initializer import word_norm
from trainer.latents import LatentDistribution
from trainer.learning import learn
from trainer.model import DiffusionModel
from trainer.objective import Objective
from trainer.options import LearnOptions, Optimizer
from trainer.run import MAX_ROLLBACKS, LearnState, Run
from trainer.splicing import TemplatePrompts
from trainer.templates import OBJECT_TEMPLATES

# Fixtures.
model_path, model, own_model, images = (
    learning_setup.model_path,
    learning_setup.model,
    learning_setup.own_model,
    learning_setup.images,
)


def test_step_is_adam_then_no_longer_than_a_word(
    model: DiffusionModel, images: TrainingImages
) -> None:
    states = list(learn(model, images, OPTIONS))
    latents = LatentDistribution.encode(model, images.pixels)
    objective = Objective.of(model, latents, TemplatePrompts.lay_out(model, OBJECT_TEMPLATES, 1))
    parameter = states[0].vectors.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([parameter], lr=OPTIONS.rate)
    lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, OPTIONS.steps)
    generator = torch.Generator()
    generator.set_state(states[0].rng_state)
    for state in states[1:]:
        batch = objective.draw(OPTIONS.batch_size, generator)
        _, parameter.grad = objective.loss_and_gradient(parameter, batch)
        optimizer.step()
        lr_schedule.step()
        with torch.no_grad():
            longest = word_norm(model)
            parameter.mul_(longest / parameter.norm(dim=1, keepdim=True).clamp(min=longest))
        # PyTorch's Adam orders the bias corrections differently: a few ulp a step.
        torch.testing.assert_close(state.vectors, parameter.detach(), rtol=1e-4, atol=1e-6)


def test_vectors_never_grow_longer_than_a_word(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(OPTIONS, learning_rate=0.5, num_vectors=2)
    norms = last_state(model, images, options).vectors.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((2,), word_norm(model)))


def test_each_of_several_vectors_is_learned(model: DiffusionModel, images: TrainingImages) -> None:
    """For months diffusers' script trained the first one alone (issue 4450)."""
    first, *_, end = learn(model, images, dataclasses.replace(OPTIONS, num_vectors=3))
    # Adam's first step is as long as the rate in each of 24 numbers.
    assert (end.vectors - first.vectors).norm(dim=1).min() > OPTIONS.rate


def test_nothing_but_the_vectors_changes(model: DiffusionModel, images: TrainingImages) -> None:
    def digest() -> str:
        parts = [model.text_encoder, model.unet, model.vae]
        weights = [w for part in parts for w in part.state_dict().values()]
        hashed = hashlib.sha256()
        for weight in [*weights, model.token_embedding]:
            hashed.update(weight.numpy().tobytes())
        return hashed.hexdigest()

    before = digest()
    last_state(model, images, OPTIONS)
    assert digest() == before
    for part in (model.text_encoder, model.unet, model.vae):
        assert all(weight.grad is None for weight in part.parameters())


def test_global_random_state_is_neither_used_nor_changed(
    model: DiffusionModel, images: TrainingImages
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = last_state(model, images, OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(last_state(model, images, OPTIONS).vectors, first.vectors)


def test_seed_changes_the_draws_but_not_the_evaluation(
    model: DiffusionModel, images: TrainingImages
) -> None:
    one, two = (
        list(learn(model, images, dataclasses.replace(OPTIONS, seed=seed))) for seed in (1, 2)
    )
    assert one[0].evaluation_loss == two[0].evaluation_loss
    assert one[1].loss != two[1].loss


def test_learning_lowers_the_evaluation_loss(model: DiffusionModel, images: TrainingImages) -> None:
    options = LearnOptions(steps=60, batch_size=4, eval_every=20, learning_rate=0.02)
    state = last_state(model, images, options)
    # Random weights hardly listen to the prompt; what they hear, gradient descent finds.
    assert state.best_evaluation_loss < state.initial_evaluation_loss
    assert state.best_step > 0


def test_usual_rate_is_in_units_of_a_word(model: DiffusionModel, images: TrainingImages) -> None:
    """As large as the numbers in a word's vector are, whatever model that is of."""
    usual = LearnOptions(steps=3, batch_size=2)
    typical = word_norm(model) / math.sqrt(model.dims[0])
    told = dataclasses.replace(usual, learning_rate=usual.rate * typical)
    assert usual.rate_is_relative and not told.rate_is_relative
    # The same numbers, multiplied in another order.
    torch.testing.assert_close(
        last_state(model, images, usual).vectors, last_state(model, images, told).vectors,
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "taken"),
    [
        ((1.0, 0.6, 0.5), 2),  # it goes down
        ((1.0, 0.5, 0.6, 0.55), 3),  # up and down: the batch cannot tell
        ((1.0, 0.5, 0.8), 1),  # gone astray: it has lost more than half of what was gained
        ((1.0, 0.5, 0.8, 0.7), 3),  # and back
        ((1.0, 0.5, 1.5), 1),
        ((1.0, 1.1, 1.0), 0),  # nothing was learned
    ],
)
def test_the_latest_vectors_are_taken_unless_they_have_gone_astray(
    model: DiffusionModel,
    images: TrainingImages,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, ...],
    taken: int,
) -> None:
    told = iter(losses)
    monkeypatch.setattr(Run, "_evaluate", lambda *_: next(told))
    options = dataclasses.replace(OPTIONS, steps=len(losses) - 1, eval_every=1)
    states = list(learn(model, images, options))
    assert states[-1].evaluation_losses == losses
    assert states[-1].best_step == taken
    assert states[-1].best_evaluation_loss == losses[taken]
    assert torch.equal(states[-1].best_vectors, states[taken].vectors)


def _break(model: DiffusionModel) -> None:
    with torch.no_grad():
        model.unet.conv_out.weight.fill_(math.nan)


def test_nan_rolls_back_with_half_the_rate_and_in_the_end_is_an_error(
    own_model: DiffusionModel, images: TrainingImages
) -> None:
    states = learn(own_model, images, OPTIONS)
    good = [next(states) for _ in range(6)]  # evaluated at steps 0 and 3
    _break(own_model)
    draws = [good[-1].rng_state]
    for count in range(1, MAX_ROLLBACKS + 1):
        state = next(states)
        assert state.rolled_back and (state.step, state.rollbacks) == (3, count)
        for name in ("vectors", "first_moment", "second_moment", "best_vectors"):
            assert torch.equal(getattr(state, name), getattr(good[3], name))
        assert state.evaluation_losses == good[3].evaluation_losses
        assert not any(torch.equal(state.rng_state, earlier) for earlier in draws)
        draws.append(state.rng_state)
    # The rate of the fourth of six steps along half a cosine, a half, three times halved.
    with pytest.raises(
        Diverged, match=r"step 4: loss nan.*rate 0\.000188, halved 3 times already; lower"
    ):
        next(states)


def test_a_run_that_was_rolled_back_goes_on_at_half_the_rate(
    own_model: DiffusionModel,
    images: TrainingImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = dataclasses.replace(OPTIONS, steps=5, eval_every=2)
    identity = identity_of(own_model, images, options)
    undisturbed = list(learn(own_model, images, options))
    states = learn(own_model, images, options)
    for _ in range(4):
        next(states)
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "evaluate", lambda *_, **__: math.inf)
        back = next(states)
    assert back.rolled_back and back.step == 2
    write_checkpoint(tmp_path / "checkpoint", back, identity)
    rest = list(states)
    assert [state.step for state in rest] == [3, 4, 5] and rest[-1].rollbacks == 1
    # Adam's step does not depend on the gradient's length: it is half as long, about.
    lengths = [
        (after.vectors - undisturbed[2].vectors).norm() for after in (rest[0], undisturbed[3])
    ]
    assert float(lengths[0] / lengths[1]) == pytest.approx(0.5, rel=0.2)
    read = read_checkpoint(tmp_path / "checkpoint", identity)
    assert read.rolled_back
    resumed = list(learn(own_model, images, options, resume_from=read))
    assert torch.equal(resumed[-1].vectors, rest[-1].vectors)


def test_evaluation_that_is_nan_is_an_error_before_the_first_step(
    own_model: DiffusionModel, images: TrainingImages
) -> None:
    _break(own_model)
    with pytest.raises(Diverged, match=r"step 0: evaluation loss nan.*float32"):
        next(learn(own_model, images, OPTIONS))


def test_evaluation_that_stays_nan_is_an_error_and_never_the_best(
    model: DiffusionModel, images: TrainingImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = learn(model, images, OPTIONS)
    first = next(states)
    monkeypatch.setattr(Objective, "evaluate", lambda *_, **__: math.nan)
    seen: list[LearnState] = []
    with pytest.raises(Diverged, match=r"step 3: evaluation loss nan.*learning rate 0\.0"):
        for state in states:
            seen.append(state)
    assert [state.step for state in seen] == [1, 2, 0] * MAX_ROLLBACKS + [1, 2]
    assert all(state.evaluation_losses == first.evaluation_losses for state in seen)


def test_every_image_is_evaluated(model: DiffusionModel) -> None:
    for num_images, expected in ((3, 32), (32, 32), (50, 50)):
        pixels = torch.rand((num_images, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
        latents = LatentDistribution.encode(model, pixels)
        prompts = TemplatePrompts.lay_out(model, OBJECT_TEMPLATES, 1)
        batch = Objective.of(model, latents, prompts).draw_evaluation(32)
        assert len(batch.latents) == expected
        assert len(batch.latents.unique(dim=0)) == num_images


def test_gradient_that_stays_zero_is_an_error(
    own_model: DiffusionModel, images: TrainingImages
) -> None:
    with torch.no_grad():
        for name, weight in own_model.unet.named_parameters():
            if ".attn2.to_v." in name:
                weight.zero_()
    with pytest.raises(NoGradient, match="exactly zero 5 times"):
        last_state(own_model, images, OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1_000_001),
        ("batch_size", 4097),
        ("batch_size", 0),
        ("num_vectors", -1),
        ("eval_every", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", 2.0),
        ("seed", -1),
        ("learnable_property", "colour"),
        ("optimizer", "sgd"),
        ("stop", "never"),
        ("initializer_candidates", ("x",) * 513),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    searched = {"initializer_token": "auto"} if name == "initializer_candidates" else {}
    with pytest.raises(LearningError, match=f"{name} must be"):
        LearnOptions(**searched, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initializer_candidates": ("cat",)}, "initializer_token must be 'auto', got None"),
        ({"stop": "dvar", "stop_window": 1}, "window must hold at least 2 evaluations, got 1"),
        ({"stop": "dvar", "stop_threshold": 1.0}, "threshold must be .* below 1, got 1.0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, message: str) -> None:
    with pytest.raises(LearningError, match=message):
        LearnOptions(**options)


@pytest.mark.parametrize(("optimizer", "factor"), [("adam", 1), ("dti", 1), ("adamw", 8)])
def test_the_rate_depends_on_the_batch_only_where_the_paper_has_it_so(
    optimizer: Optimizer, factor: int
) -> None:
    """A rate that is scaled by the batch without a word makes another run of another batch."""
    one, eight = (LearnOptions(optimizer=optimizer, batch_size=size) for size in (1, 8))
    assert eight.rate == pytest.approx(factor * one.rate)
    told = dataclasses.replace(eight, learning_rate=0.01)
    assert told.rate == dataclasses.replace(one, learning_rate=0.01).rate == 0.01


def test_largest_options_are_allowed() -> None:
    options = LearnOptions(steps=1_000_000, batch_size=4096)
    assert (options.steps, options.batch_size) == (1_000_000, 4096)
