"""Learning: the loss, the splice, the step, resume, and what must never happen."""

import dataclasses
import errno
import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from engine.concepts import MAX_NUM_VECTORS, Concept
from engine.prompts import PromptReader
from tests.tiny_model import make_tiny_model
from trainer.checkpoints import (
    RunIdentity,
    read_checkpoint,
    write_checkpoint,
)
from trainer.diffusion_loss import (
    NoiseSchedule,
    add_noise,
    diffusion_loss,
    prediction_target,
)
from trainer.errors import CheckpointError, Diverged, LearningError, NoGradient
from trainer.fingerprint import model_fingerprint
from trainer.images import TrainingImages
from trainer.initializer import initial_vectors, word_norm
from trainer.latents import LatentDistribution
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.objective import Objective
from trainer.options import LearnOptions
from trainer.run import MAX_ROLLBACKS, LearnState
from trainer.splicing import TemplatePrompts, plain_tokenizer, text_spec
from trainer.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, templates_for
from trainer.timesteps import stratified_timesteps

SIZE = 16
OPTIONS = LearnOptions(steps=6, batch_size=2, eval_every=3)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return make_tiny_model(path, max_tokens=40, unet_channels=(8, 16), latent_size=8)


@pytest.fixture(scope="module")
def model(model_path: Path) -> DiffusionModel:
    return load_model(model_path)


@pytest.fixture
def own_model(model_path: Path) -> DiffusionModel:
    """A model that a test may change."""
    return load_model(model_path)


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    pixels = torch.rand((3, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return TrainingImages(
        pixels=pixels,
        names=("a.png", "b.png", "c.png"),
        sha256=("0" * 64, "1" * 64, "2" * 64),
        upscaled=(),
        skipped=(),
    )


def _last(model: DiffusionModel, images: TrainingImages, options: LearnOptions) -> LearnState:
    return list(learn(model, images, options))[-1]


def _identity(model: DiffusionModel, images: TrainingImages, options: LearnOptions) -> RunIdentity:
    return RunIdentity.of(model, images, options, placeholder_token="<cat>")


def _tensors(state: LearnState) -> dict[str, Tensor]:
    values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


# --- the loss ---


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_target_are_those_of_diffusers(prediction_type: str, zero_snr: bool) -> None:
    config: dict[str, Any] = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
    }
    scheduler: Any = DDPMScheduler(**config)
    schedule = NoiseSchedule.from_config(config)
    latents, noise = torch.randn((2, 5, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    expected = noise
    if prediction_type == "v_prediction":
        expected = scheduler.get_velocity(latents, noise, timesteps)
    # The same formula in float32; the order of operations may differ by an ulp or two.
    torch.testing.assert_close(
        add_noise(schedule, latents, noise, timesteps),
        scheduler.add_noise(latents, noise, timesteps),
        rtol=1e-6,
        atol=1e-6,
    )
    target = prediction_target(schedule, latents, noise, timesteps)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_loss_is_zero_for_a_perfect_denoiser_and_known_for_a_constant_one() -> None:
    schedule = NoiseSchedule.from_config({"prediction_type": "epsilon"})
    latents, noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0))

    class Answers:
        dtype = torch.float32

        def __init__(self, answer: Tensor) -> None:
            self.answer = answer

        def __call__(self, *_: object, **__: object) -> tuple[Tensor]:
            return (self.answer,)

    def loss(answer: Tensor) -> Tensor:
        unet: Any = Answers(answer)
        timesteps, prompt_embeds = torch.tensor([1, 5, 900]), torch.zeros(3, 2, 2)
        return diffusion_loss(
            unet,
            schedule,
            latents=latents,
            noise=noise,
            timesteps=timesteps,
            prompt_embeds=prompt_embeds,
        )

    assert loss(noise).tolist() == [0.0, 0.0, 0.0]
    # Off by 1, 2 and 3 everywhere: 1, 4 and 9, to the rounding of float32 sums.
    offset = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    torch.testing.assert_close(loss(noise + offset), torch.tensor([1.0, 4.0, 9.0]))


def test_timesteps_have_one_in_each_part_of_the_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        timesteps = stratified_timesteps(8, 1000, generator)
        assert sorted((timesteps // 125).tolist()) == list(range(8))


def test_every_timestep_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([stratified_timesteps(4, 10, generator) for _ in range(5000)])
    counts = torch.bincount(drawn, minlength=10)
    # 20,000 draws into ten bins: 2,000 each, deviation at most 42; six deviations.
    assert (counts - 2000).abs().max() < 6 * 42


# --- latents ---


def test_latents_are_the_posterior_of_the_autoencoder(
    model: DiffusionModel, images: TrainingImages
) -> None:
    encoded: Any = model.vae.encode(images.pixels)
    posterior = encoded.latent_dist
    latents = LatentDistribution.encode(model, images.pixels)
    # One image at a time or all at once: the same convolutions in another order.
    torch.testing.assert_close(latents.mean, posterior.mean * 0.3, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(latents.std, posterior.std * 0.3, rtol=1e-4, atol=1e-6)


# --- the splice ---


@pytest.mark.parametrize("learnable_property", ["object", "style"])
@pytest.mark.parametrize("num_vectors", [1, 3])
def test_splice_is_that_of_the_engine(
    model: DiffusionModel, learnable_property: Any, num_vectors: int
) -> None:
    vectors = torch.randn((num_vectors, 24), generator=torch.Generator().manual_seed(0))
    templates = templates_for(learnable_property)
    prompts = TemplatePrompts.lay_out(model, templates, num_vectors)
    spliced = prompts.splice(vectors, torch.arange(len(templates)))
    concept = Concept(placeholder_token="<cat-toy>", learned_embeddings=vectors.numpy())
    table = model.token_embedding.numpy()
    reader = PromptReader(plain_tokenizer(model), table, text_spec(model))
    for row, template in enumerate(templates):
        read = reader.read(template.format("<cat-toy>"), [concept])
        np.testing.assert_array_equal(spliced[row].numpy(), read.inputs_embeds[0])
        assert prompts.eos_index[row] == read.eos_index[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("num_vectors", [1, 2])
def test_gradient_is_that_of_rows_added_to_the_vocabulary(
    own_model: DiffusionModel, images: TrainingImages, num_vectors: int
) -> None:
    """Against transformers as trainers use it: new tokens, a resized table, ids as input."""
    prompts = TemplatePrompts.lay_out(own_model, OBJECT_TEMPLATES, num_vectors)
    latents = LatentDistribution.encode(own_model, images.pixels)
    objective = Objective.of(own_model, latents, prompts)
    batch = objective.draw(4, torch.Generator().manual_seed(3))
    vectors = 0.3 * torch.randn((num_vectors, 24), generator=torch.Generator().manual_seed(0))
    loss, gradient = objective.loss_and_gradient(vectors, batch)

    tokenizer = own_model.tokenizer
    encoder: Any = own_model.text_encoder
    names = [f"<new{index}>" for index in range(num_vectors)]
    tokenizer.add_tokens(names)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-num_vectors:] = vectors
    table.requires_grad_(True)
    texts = [OBJECT_TEMPLATES[index].format(" ".join(names)) for index in batch.templates]
    ids = tokenizer(texts, padding="max_length", max_length=40, return_tensors="pt").input_ids
    expected = diffusion_loss(
        own_model.unet,
        objective.schedule,
        latents=batch.latents,
        noise=batch.noise,
        timesteps=batch.timesteps,
        prompt_embeds=encoder(ids).last_hidden_state,
    ).mean()
    expected.backward()
    assert table.grad is not None
    # Two implementations of the same attention mask and of float32 sums.
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    scale = table.grad[-num_vectors:].abs().max().item()
    assert scale > 0
    torch.testing.assert_close(gradient, table.grad[-num_vectors:], rtol=1e-5, atol=1e-5 * scale)


def test_templates_hold_one_slot_and_no_prompt_syntax() -> None:
    for templates in (OBJECT_TEMPLATES, STYLE_TEMPLATES):
        assert len(set(templates)) == len(templates)
        for template in templates:
            assert template.count("{}") == 1
            assert not set(template) & set("()[]:\\<>")


@pytest.mark.parametrize("num_vectors", [36, 38, 39, 75, 76, 1000, 10**9])
def test_more_vectors_than_room_is_an_error_with_the_limit(
    model: DiffusionModel, num_vectors: int
) -> None:
    # "a photo of {}" is three tokens of the tiny model, of the 38 between BOS and EOS.
    message = f"num_vectors={num_vectors} .*'a photo of {{}}'.* 38 places.* need 3;.* at most 35"
    with pytest.raises(LearningError, match=message):
        TemplatePrompts.lay_out(model, ["a photo of {}", "a {}"], num_vectors)


def test_as_many_vectors_as_there_is_room_are_laid_out(model: DiffusionModel) -> None:
    prompts = TemplatePrompts.lay_out(model, ["a photo of {}", "a {}"], 35)
    assert prompts.slots[:, 0].tolist() == [4, 2]  # behind BOS and the words
    assert prompts.eos_index.tolist() == [39, 37]


def test_more_vectors_than_a_concept_file_holds_are_refused(tmp_path: Path) -> None:
    long = load_model(make_tiny_model(tmp_path, max_tokens=100, unet_channels=(8, 16)))
    TemplatePrompts.lay_out(long, ["a photo of {}"], MAX_NUM_VECTORS)
    with pytest.raises(LearningError, match="num_vectors=76 .* at most 75"):
        TemplatePrompts.lay_out(long, ["a photo of {}"], MAX_NUM_VECTORS + 1)


def test_encoder_too_short_for_the_templates_is_said(model: DiffusionModel) -> None:
    with pytest.raises(LearningError, match="38 places, the words need 40; .*longer text encoder"):
        TemplatePrompts.lay_out(model, ["a " * 40 + "{}"], 1)


# --- where the vectors start ---


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


# --- the loop ---


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
    norms = _last(model, images, options).vectors.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((2,), word_norm(model)))


def test_nothing_but_the_vectors_changes(model: DiffusionModel, images: TrainingImages) -> None:
    def digest() -> str:
        parts = [model.text_encoder, model.unet, model.vae]
        weights = [w for part in parts for w in part.state_dict().values()]
        hashed = hashlib.sha256()
        for weight in [*weights, model.token_embedding]:
            hashed.update(weight.numpy().tobytes())
        return hashed.hexdigest()

    before = digest()
    _last(model, images, OPTIONS)
    assert digest() == before
    for part in (model.text_encoder, model.unet, model.vae):
        assert all(weight.grad is None for weight in part.parameters())


def test_global_random_state_is_neither_used_nor_changed(
    model: DiffusionModel, images: TrainingImages
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _last(model, images, OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(_last(model, images, OPTIONS).vectors, first.vectors)


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
    state = _last(model, images, options)
    # Random weights hardly listen to the prompt; what they hear, gradient descent finds.
    assert state.best_evaluation_loss < state.initial_evaluation_loss
    assert state.best_step > 0


def test_best_vectors_are_those_of_the_lowest_evaluation(
    model: DiffusionModel, images: TrainingImages
) -> None:
    options = dataclasses.replace(OPTIONS, steps=12, eval_every=2, learning_rate=0.3)
    states = list(learn(model, images, options))
    evaluated = {s.step: s.evaluation_loss for s in states if s.evaluation_loss is not None}
    assert list(evaluated) == [0, 2, 4, 6, 8, 10, 12]
    best_step = min(evaluated, key=lambda step: evaluated[step])
    assert states[-1].best_step == best_step
    assert states[-1].best_evaluation_loss == evaluated[best_step]
    assert torch.equal(states[-1].best_vectors, states[best_step].vectors)


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
    identity = _identity(own_model, images, options)
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
        _last(own_model, images, OPTIONS)


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
        ("timestep_focus", 1.5),
        ("timestep_focus", math.nan),
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
        ({"antithetic": True, "batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"initializer_candidates": ("cat",)}, "initializer_token must be 'auto', got None"),
        ({"stop": "dvar", "stop_window": 1}, "window must hold at least 2 evaluations, got 1"),
        ({"stop": "dvar", "stop_threshold": 1.0}, "threshold must be .* below 1, got 1.0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, message: str) -> None:
    with pytest.raises(LearningError, match=message):
        LearnOptions(**options)


def test_largest_options_are_allowed() -> None:
    options = LearnOptions(steps=1_000_000, batch_size=4096)
    assert (options.steps, options.batch_size) == (1_000_000, 4096)


# --- checkpoints ---


def test_a_resumed_run_is_the_same_bit_for_bit(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    options = LearnOptions(steps=40, batch_size=2, eval_every=15, num_vectors=2)
    identity = _identity(model, images, options)
    states = list(learn(model, images, options))
    write_checkpoint(tmp_path / "checkpoint", states[20], identity)
    resumed = list(
        learn(
            model, images, options, resume_from=read_checkpoint(tmp_path / "checkpoint", identity)
        )
    )
    assert [state.step for state in resumed] == list(range(21, 41))
    for state, expected in zip(resumed, states[21:], strict=True):
        found, wanted = _tensors(state), _tensors(expected)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert state.loss == expected.loss
        assert state.evaluation_loss == expected.evaluation_loss
        assert state.best_step == expected.best_step


def test_checkpoint_of_the_first_state_can_be_read(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    identity = _identity(model, images, OPTIONS)
    first = next(learn(model, images, OPTIONS))
    write_checkpoint(tmp_path / "checkpoint", first, identity)
    read = read_checkpoint(tmp_path / "checkpoint", identity)
    assert math.isnan(read.loss) and torch.equal(read.vectors, first.vectors)


def test_checkpoint_of_another_run_is_refused_and_says_what_differs(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    identity = _identity(model, images, OPTIONS)
    write_checkpoint(path, next(learn(model, images, OPTIONS)), identity)
    seven = {**identity.options, "seed": 7}
    others = {
        "seed is 7, it was 0": dataclasses.replace(identity, options=seven),
        r"images differ \(1 now, 3 then\)": dataclasses.replace(identity, images=("f" * 64,)),
        "the masks differ": _identity(
            model, dataclasses.replace(images, masks=torch.ones(3, 1, SIZE, SIZE)), OPTIONS
        ),
        "the captions differ": _identity(
            model, dataclasses.replace(images, captions=((), ("a {}",), ())), OPTIONS
        ),
        "placeholder_token is '<dog>', it was '<cat>'": dataclasses.replace(
            identity, placeholder_token="<dog>"
        ),
        "model is another one": dataclasses.replace(identity, model="0" * 64),
    }
    for message, other in others.items():
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path, other)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_fine_tuned_model_is_another_model(
    own_model: DiffusionModel, images: TrainingImages, part: str
) -> None:
    before = _identity(own_model, images, OPTIONS).model
    assert _identity(own_model, images, OPTIONS).model == before
    weight = max(getattr(own_model, part).parameters(), key=Tensor.numel)
    with torch.no_grad():
        weight[(-1,) * weight.ndim] += 1e-3
    assert _identity(own_model, images, OPTIONS).model != before


def test_other_configs_make_another_model(own_model: DiffusionModel) -> None:
    found = {model_fingerprint(own_model)}
    scheduler_config = {**own_model.scheduler_config, "beta_end": 0.013}
    found.add(model_fingerprint(dataclasses.replace(own_model, scheduler_config=scheduler_config)))
    own_model.unet.register_to_config(norm_eps=1e-4)
    found.add(model_fingerprint(own_model))
    own_model.text_encoder.config.hidden_act = "gelu"
    found.add(model_fingerprint(own_model))
    own_model.tokenizer.add_tokens(["<new>"])
    found.add(model_fingerprint(own_model))
    assert len(found) == 5


def test_fingerprint_depends_neither_on_place_nor_on_name(
    model: DiffusionModel, model_path: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(model_path, tmp_path / "elsewhere")
    assert model_fingerprint(load_model(copy)) == model_fingerprint(model)


def test_fingerprint_reads_scalars_and_bfloat16(own_model: DiffusionModel) -> None:
    own_model.unet.register_buffer("scalar", torch.tensor(1.0, dtype=torch.bfloat16))
    one = model_fingerprint(own_model)
    own_model.unet.register_buffer("scalar", torch.tensor(2.0, dtype=torch.bfloat16))
    assert model_fingerprint(own_model) != one


def test_damaged_checkpoint_is_an_error_that_names_it(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    identity = _identity(model, images, OPTIONS)
    write_checkpoint(path, next(learn(model, images, OPTIONS)), identity)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint is not a checkpoint or is damaged"):
            read_checkpoint(path, identity)
    with pytest.raises(CheckpointError, match="without --resume"):
        read_checkpoint(tmp_path / "absent", identity)


def test_failed_write_leaves_the_checkpoint_before(
    model: DiffusionModel,
    images: TrainingImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "checkpoint"
    identity = _identity(model, images, OPTIONS)
    states = list(learn(model, images, OPTIONS))
    write_checkpoint(path, states[2], identity)

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, states[4], identity)
    assert read_checkpoint(path, identity).step == 2
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
