"""One concept's run: what stays the same in it, and the states it passes through."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from trainer.cohorts import moved, num_joined
from trainer.course import Course, CoursePoint, extended
from trainer.errors import Diverged, NoGradient
from trainer.image_guide import ImageGuide, word_similarities
from trainer.image_tower import ImageTower, lent
from trainer.images import TrainingImages
from trainer.initializer import word_norm
from trainer.initializer_search import RankedWord, search
from trainer.material import Material, OwnImages, Part, mean_evaluation
from trainer.model import DiffusionModel
from trainer.objective import Vectors
from trainer.options import AUTO, LearnOptions
from trainer.per_image_tokens import PerImageTokens
from trainer.regularization import pull_to_start
from trainer.starts import Start, starting_vectors
from trainer.updates import Moments, PerEncoder, update_rule
from trainer.warm_start import Warmth, warm_started

MAX_ROLLBACKS = 3
_MAX_ZERO_GRADIENTS = 5
_KEPT_GAIN = 0.5  # of the best gain in evaluation loss: what later vectors must have to be taken


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnState:
    """A run after `step` steps: all that is needed to go on, and what is worth knowing.

    `vectors` are those that have joined, all from the start unless the run is progressive; behind
    the word's own may stand those that only learning needs (per-image tokens).
    """

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
    course: Course  # the word's vectors at those evaluations
    initial_vectors: Float32[Tensor, "all_vectors dim"]  # of those too that have yet to join
    initializers: tuple[RankedWord, ...]  # what a search found best, best first; empty without one
    warmth: Warmth | None  # what a warm start gained; None without one
    best_step: int
    # The word's vectors at the last evaluation, unless the run has gone astray since.
    best_vectors: Float32[Tensor, "word_vectors dim"]
    best_evaluation_loss: float
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
    def word_vectors(self) -> Float32[Tensor, "word_vectors dim"]:
        """The word as it is now."""
        return self.vectors[: len(self.best_vectors)]

    @property
    def rolled_back(self) -> bool:
        """Whether this is the last evaluated state once more, in place of one that was NaN."""
        return self.rollbacks > 0 and math.isnan(self.loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same while one concept is learned, or several of which images show all."""

    label: str  # before each error
    options: LearnOptions
    material: Material
    starts: tuple[Start, ...]  # of all vectors, in the order of their rows
    num_word_vectors: int  # the first rows: those that are kept
    dims: tuple[int, ...]  # of the vectors for each text encoder, which stand side by side
    norms: tuple[float, ...]  # of a word in each of them; infinite where none is held
    guides: tuple[ImageGuide, ...]  # of the text encoders that have an image tower

    @classmethod
    def prepare(
        cls,
        model: DiffusionModel,
        images: TrainingImages,
        options: LearnOptions,
        *,
        towers: Sequence[ImageTower] = (),
        label: str,
    ) -> Self:
        kind = PerImageTokens if options.per_image_tokens else OwnImages
        word = Start(
            initializer_token=options.initializer_token,
            num_vectors=options.num_vectors,
            nudged=not options.progressive,
        )
        own = Start(initializer_token=None, num_vectors=len(images.pixels))
        return cls.of(
            model,
            kind.of(model, images, options),
            options,
            starts=(word, own) if options.per_image_tokens else (word,),
            num_word_vectors=options.num_vectors,
            guides=tuple(ImageGuide.of(tower, model, images, options) for tower in towers),
            label=label,
        )

    @classmethod
    def of(
        cls,
        model: DiffusionModel,
        material: Material,
        options: LearnOptions,
        *,
        starts: tuple[Start, ...],
        num_word_vectors: int,
        guides: tuple[ImageGuide, ...] = (),
        label: str,
    ) -> Self:
        return cls(
            label=label,
            options=options,
            material=material,
            starts=starts,
            num_word_vectors=num_word_vectors,
            dims=model.dims,
            norms=tuple(
                math.inf if options.cross_initialization else word_norm(encoder)
                for encoder in model.encoders
            ),
            guides=guides,
        )

    def first_state(self, model: DiffusionModel) -> LearnState:
        generator = torch.Generator().manual_seed(self.options.seed)
        with lent([guide.tower for guide in self.guides], model.unet.device):
            initial, ranking, warmth = self._start(model, generator)
        vectors = initial[: self._num_joined(initial, step=0)]
        evaluation_loss = self._evaluate(vectors)
        if not math.isfinite(evaluation_loss):
            raise Diverged(
                f"{self.label}step 0: evaluation loss {evaluation_loss} before anything was "
                "learned; the model overflows or its weights are broken: load it in float32, or "
                "use another one"
            )
        still = torch.zeros_like(vectors)
        word = vectors[: self.num_word_vectors]
        first = CoursePoint(step=0, evaluation_loss=evaluation_loss, vectors=word)
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
            course=(first,),
            initial_vectors=initial,
            initializers=ranking,
            warmth=warmth,
            best_step=0,
            best_vectors=word,
            best_evaluation_loss=evaluation_loss,
            good_step=0,
            good_vectors=vectors,
            good_first_moment=still,
            good_second_moment=still,
            rollbacks=0,
        )

    def _start(
        self, model: DiffusionModel, generator: torch.Generator
    ) -> tuple[Vectors, tuple[RankedWord, ...], Warmth | None]:
        """Where all vectors start, with what a search found and what a warm start gained."""
        starts, ranking = self.starts, ()
        if self.options.initializer_token == AUTO:
            ranking = self._search(model)
            starts = (replace(starts[0], initializer_token=ranking[0].word), *starts[1:])
        cross = self.options.cross_initialization
        initial = starting_vectors(model, starts, generator, cross=cross)
        initial = self._rule(initial).start(initial)
        if not self.options.warm_start:
            return initial, ranking, None
        warm, warmth = self._warmed(initial)
        return warm, ranking, warmth

    def _warmed(self, initial: Vectors) -> tuple[Vectors, Warmth]:
        """The word led to what the towers see; what only learning needs stays where it is."""
        word, others = initial[: self.num_word_vectors], initial[self.num_word_vectors :]
        warm, warmth = warm_started(
            self.guides,
            word,
            steps=self.options.warm_start,
            dims=self.dims,
            norms=self.norms,
            label=self.label,
        )
        return torch.cat([self._rule(warm).start(warm), others]), warmth

    def _search(self, model: DiffusionModel) -> tuple[RankedWord, ...]:
        (part,) = self.material.evaluation(num_vectors=self.options.num_vectors)
        return search(
            model,
            part.objective,
            part.batch,
            num_vectors=self.options.num_vectors,
            start=lambda vectors: self._rule(vectors).start(vectors),
            candidates=self.options.initializer_candidates,
            similarities=word_similarities(self.guides, self.options.learnable_property),
            batch_size=self.options.batch_size,
        )

    def _rule(self, initial: Vectors) -> PerEncoder:
        return update_rule(self.options, initial, dims=self.dims, norms=self.norms)

    def ends_at(self, state: LearnState) -> bool:
        """Whether a state is the run's last."""
        options = self.options
        return state.step >= options.steps or options.settled(state.evaluation_losses)

    def draw(self, state: LearnState) -> tuple[tuple[Part, ...], UInt8[Tensor, " bytes"]]:
        """The samples of the next step, and the generator's state after it."""
        generator = torch.Generator()
        generator.set_state(state.rng_state)
        parts = self.material.draw(
            self.options.batch_size, generator, num_vectors=len(state.vectors)
        )
        return parts, generator.get_state()

    def after(self, state: LearnState, loss: float, gradient: Vectors) -> LearnState:
        """The state that follows `state` with the loss and gradient of its batch."""
        reached = bool(gradient.any())
        if self.options.pull:
            penalty, pull = self._pull(state)
            loss, gradient = loss + penalty, gradient + pull
        grad_norm = gradient.norm().item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._rolled_back(state, f"loss {loss}, gradient norm {grad_norm}")
        vectors, moments = moved(
            self.options,
            state.initial_vectors,
            state.vectors,
            gradient,
            Moments(first=state.first_moment, second=state.second_moment),
            step=state.step + 1,
            rate=self._rate(state),
            dims=self.dims,
            norms=self.norms,
        )
        after = replace(
            state,
            step=state.step + 1,
            vectors=vectors,
            first_moment=moments.first,
            second_moment=moments.second,
            zero_gradients=0 if reached else state.zero_gradients + 1,
            loss=loss,
            grad_norm=grad_norm,
            evaluation_loss=None,
        )
        self._check_moves(after)
        after = self._grown(after)
        due = after.step % self.options.eval_every == 0 or after.step == self.options.steps
        # With more vectors than before, they are judged before they move.
        grown = len(after.vectors) > len(state.vectors)
        return self._evaluated(after, before=state) if due or grown else after

    def _pull(self, state: LearnState) -> tuple[float, Vectors]:
        return pull_to_start(
            state.vectors,
            state.initial_vectors[: len(state.vectors)],
            weight=self.options.pull,
            count=self.num_word_vectors,
        )

    def _num_joined(self, initial: Vectors, *, step: int) -> int:
        return num_joined(self.options, len(initial), step=step)

    def _grown(self, state: LearnState) -> LearnState:
        """With the vectors that join at this step, as they start."""
        joined = self._num_joined(state.initial_vectors, step=state.step)
        new = state.initial_vectors[len(state.vectors) : joined]
        if not len(new):
            return state
        still = torch.zeros_like(new)
        return replace(
            state,
            vectors=torch.cat([state.vectors, new]),
            first_moment=torch.cat([state.first_moment, still]),
            second_moment=torch.cat([state.second_moment, still]),
        )

    def _evaluated(self, state: LearnState, *, before: LearnState) -> LearnState:
        loss = self._evaluate(state.vectors)
        if not math.isfinite(loss):
            return self._rolled_back(before, f"evaluation loss {loss}")
        word = state.vectors[: self.num_word_vectors]
        losses = (*state.evaluation_losses, loss)
        alike = [p.evaluation_loss for p in state.course if len(p.vectors) == len(word)]
        taken = not alike or _keeps_gain(losses[0], min(alike), loss)
        point = CoursePoint(step=state.step, evaluation_loss=loss, vectors=word)
        return replace(
            state,
            evaluation_loss=loss,
            evaluation_losses=losses,
            course=extended(state.course, point),
            best_step=state.step if taken else state.best_step,
            best_vectors=word if taken else state.best_vectors,
            best_evaluation_loss=loss if taken else state.best_evaluation_loss,
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
        parts = self.material.evaluation(num_vectors=len(vectors))
        return mean_evaluation(vectors, parts, at_once=at_once)

    def _check_moves(self, state: LearnState) -> None:
        if state.zero_gradients >= _MAX_ZERO_GRADIENTS:
            raise NoGradient(
                f"{self.label}step {state.step}: the gradient was exactly zero "
                f"{state.zero_gradients} times in a row, so nothing is learned; the attention "
                "backend or the model cuts it off: try the default attention, in float32"
            )


def _keeps_gain(initial: float, best: float, last: float) -> bool:
    """Whether the last evaluated vectors are taken, and not those that were taken before.

    Late ones are better, as the rate falls to zero. The evaluation batch is too small to tell good
    vectors from better ones: to take those with its lowest loss was worse than not to choose
    (docs/learning.md). It tells that a run has gone astray.
    """
    return initial - last > 0 and initial - last >= _KEPT_GAIN * (initial - best)
