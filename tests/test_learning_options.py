"""What can be told to a run: masks, captions, timesteps, noise, how vectors move, when to stop."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import learning_setup
from tests.learning_setup import OPTIONS, SIZE, TEMPLATES, left_half, objective_of, random_images
from tests.tiny_model import XL_DIMS, make_tiny_xl_model
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.diffusion_loss import add_noise
from trainer.errors import LearningError
from trainer.image_prompts import ImagePrompts, draw_prompts
from trainer.images import TrainingImages
from trainer.initializer import phrase_vectors, word_norm
from trainer.latents import LatentDistribution
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.objective import Batch, Objective, error_weights
from trainer.options import LearnOptions
from trainer.run import LearnState
from trainer.splicing import TemplatePrompts
from trainer.stopping import DeterministicVariance
from trainer.templates import OBJECT_TEMPLATES

# Fixtures.
model_path, model, images = learning_setup.model_path, learning_setup.model, learning_setup.images


def _states(
    model: DiffusionModel, images: TrainingImages, **options: Any
) -> tuple[LearnOptions, list[LearnState]]:
    chosen = dataclasses.replace(OPTIONS, **options)
    return chosen, list(learn(model, images, chosen))


def _vectors(model: DiffusionModel, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn((1, model.dims[0]), generator=torch.Generator().manual_seed(seed))


# --- masks ---


def test_masked_loss_is_the_weighted_mean_of_squared_errors(
    model: DiffusionModel, images: TrainingImages
) -> None:
    """Against the sums written out, with masks of any level averaged over 2 x 2 pixels."""
    levels = torch.rand((3, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(5))
    objective = objective_of(model, dataclasses.replace(images, masks=levels))
    batch = objective.draw(4, torch.Generator().manual_seed(3))
    vectors = _vectors(model)
    found = objective.losses(vectors, batch)

    ((embeds, eos_index),) = objective.encoder_inputs(vectors, batch)
    prompt_embeds, _ = objective.prompt_encoder([embeds], [eos_index])
    noisy = add_noise(objective.schedule, batch.latents, batch.noise, batch.timesteps)
    predicted = model.unet(noisy, batch.timesteps, prompt_embeds, return_dict=False)[0]
    squared = ((predicted - batch.noise) ** 2).double().numpy()
    # Which image a sample is of, from its weights.
    averaged = levels[:, 0].reshape(3, 8, 2, 8, 2).mean(dim=(2, 4)).double().numpy()
    scaled = averaged / averaged.mean(axis=(1, 2), keepdims=True)
    for row, loss in enumerate(found):
        distances = np.abs(scaled - batch.weights[row, 0].numpy()).max(axis=(1, 2))
        mask = averaged[distances.argmin()]
        expected = (mask * squared[row]).sum() / (mask.sum() * squared.shape[1])
        assert distances.min() < 1e-5
        assert loss.item() == pytest.approx(expected, rel=1e-5)  # float32 sums of 256 errors


def test_errors_outside_the_mask_have_no_part_in_loss_and_gradient(
    model: DiffusionModel, images: TrainingImages
) -> None:
    """A target that is another one there, with the same noisy input, changes nothing."""
    objective = objective_of(model, left_half(images, masked=(0, 1, 2)))
    batch = objective.draw(4, torch.Generator().manual_seed(3))
    signal, deviation = objective.schedule.signal_and_noise(batch.timesteps)
    outside = (batch.weights == 0).float() * torch.randn_like(batch.noise)
    # Noise moved one way and latents the other: what the denoiser sees stays as it is.
    other = dataclasses.replace(
        batch,
        noise=batch.noise + outside,
        latents=batch.latents - deviation / signal * outside,
    )
    everywhere = torch.ones_like(batch.weights)
    vectors = _vectors(model)

    def both(weights: Tensor) -> list[tuple[float, Tensor]]:
        trials = [dataclasses.replace(b, weights=weights) for b in (batch, other)]
        return [objective.loss_and_gradient(vectors, trial) for trial in trials]

    (loss, gradient), (other_loss, other_gradient) = both(batch.weights)
    # The noisy inputs agree to float32 rounding only, at late timesteps to some 1e-5.
    assert other_loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(
        other_gradient, gradient, rtol=0, atol=2e-3 * gradient.abs().max().item()
    )
    (loss, _), (other_loss, _) = both(everywhere)
    assert other_loss > 1.2 * loss


def test_an_image_without_a_mask_counts_as_if_there_were_none(
    model: DiffusionModel, images: TrainingImages
) -> None:
    plain, mixed = (objective_of(model, one) for one in (images, left_half(images, masked=(1,))))
    batches = [one.draw(6, torch.Generator().manual_seed(3)) for one in (plain, mixed)]
    losses = [
        one.losses(_vectors(model), batch)
        for one, batch in zip((plain, mixed), batches, strict=True)
    ]
    unmasked = (batches[1].weights == 1).all(dim=(1, 2, 3))
    assert unmasked.sum() == 4  # two of three images, each twice
    assert torch.equal(losses[0][unmasked], losses[1][unmasked])
    assert not torch.isclose(losses[0], losses[1])[~unmasked].any()


def test_weights_are_the_averaged_mask_with_a_mean_of_one() -> None:
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :, :3] = 1.0  # one and a half columns of 2 x 2 pixels
    masks[1] = 1.0
    weights = error_weights(masks, torch.zeros(2, 4, 4, 4))
    assert weights[0, 0, 0].tolist() == pytest.approx([8 / 3, 4 / 3, 0.0, 0.0])
    assert torch.equal(weights[1], torch.ones(1, 4, 4))
    assert torch.equal(error_weights(None, torch.zeros(2, 4, 4, 4)), torch.ones(2, 1, 4, 4))


def test_masks_change_what_is_learned(model: DiffusionModel, images: TrainingImages) -> None:
    _, plain = _states(model, images)
    _, masked = _states(model, left_half(images, masked=(0, 1, 2)))
    assert plain[0].evaluation_loss != masked[0].evaluation_loss
    assert not torch.equal(plain[-1].vectors, masked[-1].vectors)


# --- captions ---


def test_an_image_with_captions_has_those_and_others_have_the_templates() -> None:
    prompts = ImagePrompts.of(TEMPLATES, ((), ("{} left", "{} right"), (), ("{} up",)), 4)
    assert prompts.texts == (*TEMPLATES, "{} left", "{} right", "{} up")
    places = torch.arange(4).repeat(3000)
    drawn = draw_prompts(prompts.choices, places, torch.Generator().manual_seed(0))
    allowed = ([0, 1, 2], [3, 4], [0, 1, 2], [5])
    for image, texts in enumerate(allowed):
        counts = torch.bincount(drawn[places == image], minlength=6)
        # 3,000 draws among n texts: a deviation of at most 28; six of them.
        expected = [3000 / len(texts) if place in texts else 0 for place in range(6)]
        assert counts.tolist() == pytest.approx(expected, abs=6 * 28)
        assert counts[[place for place in range(6) if place not in texts]].sum() == 0


def test_without_captions_prompts_are_drawn_as_one_uniform_draw() -> None:
    """The draws of runs from before captions: a seed still means the same."""
    prompts = ImagePrompts.of(OBJECT_TEMPLATES, (), 3)
    drawn = draw_prompts(
        prompts.choices, torch.tensor([0, 2, 1] * 20), torch.Generator().manual_seed(4)
    )
    expected = torch.randint(
        len(OBJECT_TEMPLATES), (60,), generator=torch.Generator().manual_seed(4)
    )
    assert torch.equal(drawn, expected)


def test_captions_are_in_training_and_evaluation_batches_of_their_image(
    model: DiffusionModel, images: TrainingImages
) -> None:
    prompts = ImagePrompts.of(TEMPLATES, ((), ("{} in the morning",), ()), 3)
    objective = Objective.of(
        model,
        LatentDistribution.encode(model, images.pixels),
        TemplatePrompts.lay_out(model, prompts.texts, 1),
        choices=prompts.choices,
    )
    evaluation = objective.draw_evaluation(32)
    assert [place == 3 for place in evaluation.templates.tolist()] == [
        place % 3 == 1 for place in range(32)
    ]
    training = objective.draw(6, torch.Generator().manual_seed(0))
    assert (training.templates == 3).sum() == 2


def test_a_caption_that_leaves_no_room_is_refused_by_name(
    model: DiffusionModel, images: TrainingImages
) -> None:
    captions = ((), ("{}" + " a photo" * 20,), ())
    with pytest.raises(LearningError, match="'{} a photo a photo .* leaves no room"):
        next(learn(model, dataclasses.replace(images, captions=captions), OPTIONS))


# --- timesteps and noise ---


def test_evaluation_is_the_same_whatever_is_drawn_for_training(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = {"stop": "dvar", "batch_size": 4}
    assert _states(model, images)[1][0].evaluation_loss == pytest.approx(
        _states(model, images, **options)[1][0].evaluation_loss, rel=1e-6
    )  # in batches of another size


# --- how vectors move ---


def _training_batches(
    model: DiffusionModel, images: TrainingImages, states: list[LearnState], size: int
) -> list[tuple[Objective, Batch]]:
    objective = Objective.of(
        model,
        LatentDistribution.encode(model, images.pixels),
        TemplatePrompts.lay_out(model, OBJECT_TEMPLATES, 1),
    )
    generator = torch.Generator()
    generator.set_state(states[0].rng_state)
    return [(objective, objective.draw(size, generator)) for _ in states[1:]]


def test_adamw_is_that_of_torch_with_the_papers_settings(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options, states = _states(
        model, images, optimizer="adamw", initializer_token="cat", learning_rate=None
    )
    assert options.rate == 5e-3 * options.batch_size
    assert [options.rate_at(step) for step in (0, 5)] == [options.rate] * 2
    parameter = phrase_vectors(model, "cat", 1).requires_grad_(True)
    assert torch.equal(states[0].vectors, parameter)
    optimizer = torch.optim.AdamW([parameter], lr=options.rate)
    batches = _training_batches(model, images, states, options.batch_size)
    for state, (objective, batch) in zip(states[1:], batches, strict=True):
        _, parameter.grad = objective.loss_and_gradient(parameter, batch)
        optimizer.step()
        # PyTorch's Adam orders the bias corrections differently: a few ulp a step.
        torch.testing.assert_close(state.vectors, parameter.detach(), rtol=1e-4, atol=1e-6)
    assert float(states[-1].vectors.norm()) > word_norm(model)


def test_dti_turns_vectors_of_one_length_by_its_rate(
    model: DiffusionModel, images: TrainingImages
) -> None:
    _, states = _states(model, images, optimizer="dti", initializer_token="cat", learning_rate=None)
    assert torch.cosine_similarity(
        states[0].vectors, phrase_vectors(model, "cat", 1)
    ).item() == pytest.approx(1.0, abs=1e-6)
    units = torch.cat([state.vectors for state in states]).double()
    norms = units.norm(dim=1)
    assert norms.tolist() == pytest.approx([word_norm(model)] * len(states), rel=1e-6)
    units = units / norms[:, None]
    angles = torch.acos((units[1:] * units[:-1]).sum(dim=1))
    # A float32 direction is good to 1e-7, so an angle of 0.04 to some 1e-6.
    assert angles.tolist() == pytest.approx([math.atan(0.04)] * 6, abs=1e-5)


def test_each_encoders_part_has_its_own_length(tmp_path: Path) -> None:
    model = load_model(make_tiny_xl_model(tmp_path, max_tokens=40))
    pixels = torch.rand((2, 3, 24, 24), generator=torch.Generator().manual_seed(1)) * 2 - 1
    images = dataclasses.replace(random_images(2), pixels=pixels)
    options = LearnOptions(steps=2, batch_size=2, num_vectors=2, optimizer="dti")
    first, *_, last = learn(model, images, options)
    for encoder, before, after in zip(
        model.encoders,
        first.vectors.split(XL_DIMS, dim=1),
        last.vectors.split(XL_DIMS, dim=1),
        strict=True,
    ):
        for part in (before, after):
            lengths = part.norm(dim=1).tolist()
            assert lengths == pytest.approx([word_norm(encoder)] * 2, rel=1e-6)
        assert torch.cosine_similarity(before, after).max() < 0.9999


@pytest.mark.parametrize("optimizer", ["adamw", "dti"])
def test_a_resumed_run_is_the_same_bit_for_bit_with_every_option(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path, optimizer: Any
) -> None:
    images = dataclasses.replace(
        left_half(images, masked=(0,)), captions=((), ("{} in the morning", "red {}"), ())
    )
    options, states = _states(
        model,
        images,
        optimizer=optimizer,
        stop="dvar",
        initializer_token="auto",
        initializer_candidates=("cat", "dog"),
    )
    identity = RunIdentity.of(model, images, options, placeholder_token="<cat>")
    write_checkpoint(tmp_path / "checkpoint", states[4], identity)
    read = read_checkpoint(tmp_path / "checkpoint", identity)
    assert read.initializers == states[0].initializers
    assert {word for word, _ in read.initializers} == {"cat", "dog"}
    resumed = list(learn(model, images, options, resume_from=read))
    assert [state.step for state in resumed] == [5, 6]
    assert torch.equal(resumed[-1].vectors, states[-1].vectors)
    assert resumed[-1].evaluation_losses == states[-1].evaluation_losses


# --- when to stop ---


def test_dvar_stops_at_the_first_evaluation_that_has_settled(
    model: DiffusionModel, images: TrainingImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights' loss does not fall like a real one: the evaluations are made up."""
    falling = [0.3 + 0.2 * math.exp(-place / 2) for place in range(40)]
    evaluations = iter(falling)
    monkeypatch.setattr(Objective, "evaluate", lambda *_, **__: next(evaluations))
    options, states = _states(
        model, images, steps=40, eval_every=1, batch_size=1, stop="dvar", stop_window=5
    )
    rule = DeterministicVariance(window=5, threshold=options.stop_threshold)
    expected = next(n for n in range(41) if rule.settled(falling[:n])) - 1
    assert 5 < expected < 30 and states[-1].step == expected
    assert states[-1].evaluation_losses == tuple(falling[: expected + 1])
    assert not list(learn(model, images, options, resume_from=states[-1]))


def test_the_step_limit_ends_a_run_that_does_not_settle(
    model: DiffusionModel, images: TrainingImages
) -> None:
    _, states = _states(model, images, stop="dvar")
    assert states[-1].step == OPTIONS.steps
