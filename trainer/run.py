"""One concept's run: what stays the same in it, and the states it passes through."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from trainer.errors import Diverged, NoGradient
from trainer.image_prompts import ImagePrompts
from trainer.images import TrainingImages
from trainer.initializer import initial_vectors, word_norm
from trainer.initializer_search import RankedWord, search
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel
from trainer.objective import Batch, Objective, Vectors
from trainer.options import AUTO, LearnOptions
from trainer.splicing import TemplatePrompts
from trainer.templates import templates_for
from trainer.updates import Moments, PerEncoder, update_rule

EVALUATION_BATCH_SIZE = 32  # at least; with more images, one sample of each
MAX_ROLLBACKS = 3
_MAX_ZERO_GRADIENTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnState:
    """A run after `step` steps: all that is needed to go on, and what is worth knowing."""

    step: int
    vectors: Float32[Tensor, "num_vectors dim"]
    first_moment: Float32[Tensor, "num_vectors dim"]
    second_moment: Float32[Tensor, "num_vectors dim"]
    rng_state: UInt8[Tensor, " bytes"]
    zero_gradients: int  # in a row, up to this step
    loss: float  # of this step's random batch; NaN at step 0, and where a run was rolled back
    grad_norm: float
    evaluation_loss: float | None  # on the fixed batch; None when not due at this step
    evaluation_losses: tuple[float, ...]  # all so far, from before the first step on
    initial_vectors: Float32[Tensor, "num_vectors dim"]
    initializers: tuple[RankedWord, ...]  # what a search found best, best first; empty without one
    best_step: int
    best_vectors: Float32[Tensor, "num_vectors dim"]  # with the lowest evaluation loss so far
    # At the last evaluation: what a run that has become NaN returns to.
    good_step: int
    good_vectors: Float32[Tensor, "num_vectors dim"]
    good_first_moment: Float32[Tensor, "num_vectors dim"]
    good_second_moment: Float32[Tensor, "num_vectors dim"]
    rollbacks: int  # so far; each halves the learning rate

    @property
    def initial_evaluation_loss(self) -> float:
        return self.evaluation_losses[0]

    @property
    def best_evaluation_loss(self) -> float:
        return min(self.evaluation_losses)

    @property
    def rolled_back(self) -> bool:
        """Whether this is the last evaluated state once more, in place of one that was NaN."""
        return self.rollbacks > 0 and math.isnan(self.loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same while one concept is learned."""

    label: str  # before each error
    options: LearnOptions
    objective: Objective
    evaluation: Batch
    dims: tuple[int, ...]  # of the vectors for each text encoder, which stand side by side
    norms: tuple[float, ...]  # of a word in each of them

    @classmethod
    def prepare(
        cls, model: DiffusionModel, images: TrainingImages, options: LearnOptions, *, label: str
    ) -> Self:
        templates = templates_for(options.learnable_property)
        prompts = ImagePrompts.of(templates, images.captions, len(images.pixels))
        objective = Objective.of(
            model,
            LatentDistribution.encode(model, images.pixels),
            TemplatePrompts.lay_out(model, prompts.texts, options.num_vectors),
            choices=prompts.choices,
            masks=images.masks,
            focus=options.timestep_focus,
            antithetic=options.antithetic,
        )
        return cls(
            label=label,
            options=options,
            objective=objective,
            evaluation=objective.draw_evaluation(EVALUATION_BATCH_SIZE),
            dims=model.dims,
            norms=tuple(word_norm(encoder) for encoder in model.encoders),
        )

    def first_state(self, model: DiffusionModel) -> LearnState:
        generator = torch.Generator().manual_seed(self.options.seed)
        initializer, ranking = self._initializer(model)
        initial = initial_vectors(
            model,
            initializer_token=initializer,
            num_vectors=self.options.num_vectors,
            generator=generator,
        )
        vectors = self._rule(initial).start(initial)
        evaluation_loss = self._evaluate(vectors)
        if not math.isfinite(evaluation_loss):
            raise Diverged(
                f"{self.label}step 0: evaluation loss {evaluation_loss} before anything was "
                "learned; the model overflows or its weights are broken: load it in float32, or "
                "use another one"
            )
        still = torch.zeros_like(vectors)
        return LearnState(
            step=0,
            vectors=vectors,
            first_moment=still,
            second_moment=still,
            rng_state=generator.get_state(),
            zero_gradients=0,
            loss=math.nan,
            grad_norm=0.0,
            evaluation_loss=evaluation_loss,
            evaluation_losses=(evaluation_loss,),
            initial_vectors=vectors,
            initializers=ranking,
            best_step=0,
            best_vectors=vectors,
            good_step=0,
            good_vectors=vectors,
            good_first_moment=still,
            good_second_moment=still,
            rollbacks=0,
        )

    def _initializer(self, model: DiffusionModel) -> tuple[str | None, tuple[RankedWord, ...]]:
        """The phrase to start from, and if it was searched for what the search found."""
        if self.options.initializer_token != AUTO:
            return self.options.initializer_token, ()
        ranking = search(
            model,
            self.objective,
            self.evaluation,
            num_vectors=self.options.num_vectors,
            start=lambda vectors: self._rule(vectors).start(vectors),
            candidates=self.options.initializer_candidates,
            batch_size=self.options.batch_size,
        )
        return ranking[0].word, ranking

    def _rule(self, initial: Vectors) -> PerEncoder:
        return update_rule(self.options.optimizer, initial, dims=self.dims, norms=self.norms)

    def ends_at(self, state: LearnState) -> bool:
        """Whether a state is the run's last."""
        options = self.options
        return state.step >= options.steps or options.settled(state.evaluation_losses)

    def draw(self, state: LearnState) -> tuple[Batch, UInt8[Tensor, " bytes"]]:
        """The batch of the next step, and the generator's state after it."""
        generator = torch.Generator()
        generator.set_state(state.rng_state)
        return self.objective.draw(self.options.batch_size, generator), generator.get_state()

    def after(self, state: LearnState, loss: float, gradient: Vectors) -> LearnState:
        """The state that follows `state` with the loss and gradient of its batch."""
        grad_norm = gradient.norm().item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._rolled_back(state, f"loss {loss}, gradient norm {grad_norm}")
        vectors, moments = self._rule(state.initial_vectors)(
            state.vectors,
            gradient,
            Moments(first=state.first_moment, second=state.second_moment),
            step=state.step + 1,
            rate=self._rate(state),
        )
        moved = replace(
            state,
            step=state.step + 1,
            vectors=vectors,
            first_moment=moments.first,
            second_moment=moments.second,
            zero_gradients=0 if gradient.any() else state.zero_gradients + 1,
            loss=loss,
            grad_norm=grad_norm,
            evaluation_loss=None,
        )
        self._check_moves(moved)
        due = moved.step % self.options.eval_every == 0 or moved.step == self.options.steps
        return self._evaluated(moved, before=state) if due else moved

    def _evaluated(self, state: LearnState, *, before: LearnState) -> LearnState:
        loss = self._evaluate(state.vectors)
        if not math.isfinite(loss):
            return self._rolled_back(before, f"evaluation loss {loss}")
        improved = loss < state.best_evaluation_loss
        return replace(
            state,
            evaluation_loss=loss,
            evaluation_losses=(*state.evaluation_losses, loss),
            best_step=state.step if improved else state.best_step,
            best_vectors=state.vectors if improved else state.best_vectors,
            good_step=state.step,
            good_vectors=state.vectors,
            good_first_moment=state.first_moment,
            good_second_moment=state.second_moment,
        )

    def _rolled_back(self, state: LearnState, what: str) -> LearnState:
        """The last evaluated state with half the rate; its draws are new ones, which may do."""
        if state.rollbacks >= MAX_ROLLBACKS:
            raise Diverged(
                f"{self.label}step {state.step + 1}: {what} at learning rate "
                f"{self._rate(state):.3g}, halved {state.rollbacks} times already; lower "
                "--learning-rate (a tenth of it), or load the model in float32 if it is in half "
                "precision"
            )
        return replace(
            state,
            step=state.good_step,
            vectors=state.good_vectors,
            first_moment=state.good_first_moment,
            second_moment=state.good_second_moment,
            zero_gradients=0,
            loss=math.nan,
            grad_norm=0.0,
            evaluation_loss=None,
            rollbacks=state.rollbacks + 1,
        )

    def _rate(self, state: LearnState) -> float:
        """Of the next step."""
        return self.options.rate_at(state.step) * 0.5**state.rollbacks

    def _evaluate(self, vectors: Vectors) -> float:
        # A sample without gradient takes a fraction of the memory of one with.
        at_once = 4 * self.options.batch_size
        return self.objective.evaluate(vectors, self.evaluation, at_once=at_once)

    def _check_moves(self, state: LearnState) -> None:
        if state.zero_gradients >= _MAX_ZERO_GRADIENTS:
            raise NoGradient(
                f"{self.label}step {state.step}: the gradient was exactly zero "
                f"{state.zero_gradients} times in a row, so nothing is learned; the attention "
                "backend or the model cuts it off: try the default attention, in float32"
            )
