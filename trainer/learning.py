"""Learning a new word: Textual Inversion (Gal et al. 2022, arXiv 2208.01618).

Only the new vectors are learned; vocabulary, text encoder, denoiser and autoencoder stay as they
are. `learn` is a generator of states: progress, previews and checkpoints happen to it from outside,
and a run that goes on from any of its states repeats the rest bit for bit (on the CPU).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from trainer.errors import Diverged, LearningError, NoGradient
from trainer.images import TrainingImages
from trainer.initializer import initial_vectors, shortened_parts, word_norm
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel
from trainer.objective import Batch, Objective
from trainer.splicing import TemplatePrompts
from trainer.templates import LearnableProperty, templates_for

EVALUATION_BATCH_SIZE = 32  # at least; with more images, one sample of each
MAX_STEPS = 1_000_000
MAX_BATCH_SIZE = 4096
_MAX_ZERO_GRADIENTS = 5
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnOptions:
    """Everything that decides what is learned; docs/learning.md gives reasons for the defaults."""

    steps: int = 400
    batch_size: int = 8
    learning_rate: float = 3e-3  # falls to zero along half a cosine
    num_vectors: int = 1
    initializer_token: str | None = None  # a word or phrase; None: the mean of the vocabulary
    learnable_property: LearnableProperty = "object"
    seed: int = 0
    eval_every: int = 50  # steps between two evaluations on the fixed batch

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "num_vectors", "eval_every"):
            if getattr(self, name) < 1:
                raise LearningError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, limit in (("steps", MAX_STEPS), ("batch_size", MAX_BATCH_SIZE)):
            if getattr(self, name) > limit:
                raise LearningError(f"{name} must be at most {limit}, got {getattr(self, name)}")
        if not 0.0 < self.learning_rate <= 1.0:
            raise LearningError(
                f"learning_rate must be above 0 and at most 1, got {self.learning_rate}"
            )
        if not 0 <= self.seed < 2**63:
            raise LearningError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        if self.learnable_property not in ("object", "style"):
            raise LearningError(
                f"learnable_property must be object or style, got {self.learnable_property!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnState:
    """A run after `step` steps: all that is needed to go on, and what is worth knowing."""

    step: int
    vectors: Float32[Tensor, "num_vectors dim"]
    first_moment: Float32[Tensor, "num_vectors dim"]
    second_moment: Float32[Tensor, "num_vectors dim"]
    rng_state: UInt8[Tensor, " bytes"]
    zero_gradients: int  # in a row, up to this step
    loss: float  # of this step's random batch; NaN at step 0
    grad_norm: float
    evaluation_loss: float | None  # on the fixed batch; None when not due at this step
    initial_evaluation_loss: float
    best_step: int
    best_vectors: Float32[Tensor, "num_vectors dim"]  # with the lowest evaluation loss so far
    best_evaluation_loss: float


def learn(
    model: DiffusionModel,
    images: TrainingImages,
    options: LearnOptions,
    *,
    resume_from: LearnState | None = None,
) -> Iterator[LearnState]:
    """Yield the state before the first step (unless resumed), then after each of `options.steps`.

    The result is `best_vectors` of the last state. Raises `Diverged` or `NoGradient`; the state
    yielded before is then the last good one.
    """
    run = _Run.prepare(model, images, options)
    state = resume_from
    if state is None:
        state = run.first_state(model)
        yield state
    while state.step < options.steps:
        state = run.advance(state)
        yield state


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What stays the same in a run."""

    options: LearnOptions
    objective: Objective
    evaluation: Batch
    dims: tuple[int, ...]  # of the vectors for each text encoder, which stand side by side
    max_norms: tuple[float, ...]  # for each of them: no longer than a word

    @classmethod
    def prepare(cls, model: DiffusionModel, images: TrainingImages, options: LearnOptions) -> Self:
        templates = templates_for(options.learnable_property)
        prompts = TemplatePrompts.lay_out(model, templates, options.num_vectors)
        objective = Objective.of(model, LatentDistribution.encode(model, images.pixels), prompts)
        return cls(
            options=options,
            objective=objective,
            evaluation=objective.draw_evaluation(EVALUATION_BATCH_SIZE),
            dims=model.dims,
            max_norms=tuple(word_norm(encoder) for encoder in model.encoders),
        )

    def first_state(self, model: DiffusionModel) -> LearnState:
        generator = torch.Generator().manual_seed(self.options.seed)
        vectors = initial_vectors(
            model,
            initializer_token=self.options.initializer_token,
            num_vectors=self.options.num_vectors,
            generator=generator,
        )
        evaluation_loss = self._evaluate(vectors)
        if not math.isfinite(evaluation_loss):
            raise Diverged(
                f"step 0: evaluation loss {evaluation_loss} before anything was learned; the model "
                "overflows or its weights are broken: load it in float32, or use another one"
            )
        return LearnState(
            step=0,
            vectors=vectors,
            first_moment=torch.zeros_like(vectors),
            second_moment=torch.zeros_like(vectors),
            rng_state=generator.get_state(),
            zero_gradients=0,
            loss=math.nan,
            grad_norm=0.0,
            evaluation_loss=evaluation_loss,
            initial_evaluation_loss=evaluation_loss,
            best_step=0,
            best_vectors=vectors,
            best_evaluation_loss=evaluation_loss,
        )

    def advance(self, state: LearnState) -> LearnState:
        """One step: a pure function of the state."""
        generator = torch.Generator()
        generator.set_state(state.rng_state)
        batch = self.objective.draw(self.options.batch_size, generator)
        loss, gradient = self.objective.loss_and_gradient(state.vectors, batch)
        grad_norm = gradient.norm().item()
        self._check_finite(state, loss, grad_norm)
        moved = self._update(state, gradient)
        moved = replace(moved, loss=loss, grad_norm=grad_norm, rng_state=generator.get_state())
        self._check_moves(moved)
        return self._with_evaluation(moved)

    def _update(
        self, state: LearnState, gradient: Float32[Tensor, "num_vectors dim"]
    ) -> LearnState:
        """Adam (arXiv 1412.6980, algorithm 1), then no longer than a word.

        Adam alone makes the vectors ever longer, until the words around them are ignored
        (DTI, arXiv 2512.13672, keeps them on a sphere; here they may also be shorter).
        """
        step = state.step + 1
        first = torch.lerp(gradient, state.first_moment, _BETAS[0])
        second = torch.lerp(gradient.square(), state.second_moment, _BETAS[1])
        unbiased = first / (1 - _BETAS[0] ** step)
        deviation = (second / (1 - _BETAS[1] ** step)).sqrt()
        learning_rate = self._learning_rate(state.step)
        vectors = state.vectors - learning_rate * unbiased / (deviation + _EPSILON)
        return replace(
            state,
            step=step,
            vectors=shortened_parts(vectors, self.dims, self.max_norms),
            first_moment=first,
            second_moment=second,
            zero_gradients=0 if gradient.any() else state.zero_gradients + 1,
        )

    def _learning_rate(self, step: int) -> float:
        progress = step / self.options.steps
        return self.options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def _with_evaluation(self, state: LearnState) -> LearnState:
        due = state.step % self.options.eval_every == 0 or state.step == self.options.steps
        if not due:
            return replace(state, evaluation_loss=None)
        evaluation_loss = self._evaluate(state.vectors)
        if not math.isfinite(evaluation_loss):
            raise self._diverged(state.step, f"evaluation loss {evaluation_loss}")
        state = replace(state, evaluation_loss=evaluation_loss)
        if evaluation_loss < state.best_evaluation_loss:
            state = replace(
                state,
                best_step=state.step,
                best_vectors=state.vectors,
                best_evaluation_loss=evaluation_loss,
            )
        return state

    def _evaluate(self, vectors: Float32[Tensor, "num_vectors dim"]) -> float:
        # A sample without gradient takes a fraction of the memory of one with.
        at_once = 4 * self.options.batch_size
        return self.objective.evaluate(vectors, self.evaluation, at_once=at_once)

    def _check_finite(self, state: LearnState, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._diverged(state.step + 1, f"loss {loss}, gradient norm {grad_norm}")

    def _diverged(self, step: int, what: str) -> Diverged:
        return Diverged(
            f"step {step}: {what} at learning rate {self._learning_rate(step - 1):.3g}; lower "
            "--learning-rate (a tenth of it), or load the model in float32 if it is in half "
            "precision"
        )

    def _check_moves(self, state: LearnState) -> None:
        if state.zero_gradients >= _MAX_ZERO_GRADIENTS:
            raise NoGradient(
                f"step {state.step}: the gradient was exactly zero {state.zero_gradients} times in "
                "a row, so nothing is learned; the attention backend or the model cuts it off: try "
                "the default attention, in float32"
            )
