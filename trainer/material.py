"""What a run learns from: a step's samples, and which vectors stand in their sentences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from jaxtyping import Int64
from torch import Tensor

from trainer.image_prompts import ImagePrompts
from trainer.images import TrainingImages
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel
from trainer.objective import Batch, Objective, Trial, Vectors, joint_losses
from trainer.options import LearnOptions
from trainer.splicing import TemplatePrompts
from trainer.templates import LearnableProperty, templates_for

EVALUATION_BATCH_SIZE = 32  # at least; with more images, one sample of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Samples of one objective, and which rows of a run's vectors fill their slots."""

    objective: Objective
    batch: Batch
    rows: Int64[Tensor, "*samples slots"] | None = None  # for all, or each sample's; None: all rows

    def __len__(self) -> int:
        return len(self.batch)

    def split(self, size: int) -> list["Part"]:
        """The same samples in parts of at most `size`."""
        each = self.rows if self.rows is not None and self.rows.ndim == 2 else None
        return [
            replace(
                self,
                batch=self.batch.take(places),
                rows=self.rows if each is None else each[places],
            )
            for places in torch.arange(len(self)).split(size)
        ]

    def trial(self, vectors: Vectors) -> Trial:
        chosen = vectors if self.rows is None else vectors[self.rows]
        return Trial(objective=self.objective, vectors=chosen, batch=self.batch)

    def evaluate(self, vectors: Vectors, *, at_once: int) -> float:
        """The mean loss, `at_once` samples at a time; the rows must be the same for all samples."""
        trial = self.trial(vectors)
        return self.objective.evaluate(trial.vectors, self.batch, at_once=at_once)


class Material(Protocol):
    """What a run learns from. `num_vectors` are the rows that its vectors have at a step."""

    def draw(
        self, batch_size: int, generator: torch.Generator, *, num_vectors: int
    ) -> tuple[Part, ...]:
        """The samples of one step."""
        ...

    def evaluation(self, *, num_vectors: int) -> tuple[Part, ...]:
        """The fixed samples that vectors are compared on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnImages:
    """One word, its images, and slots for all of its vectors."""

    objectives: tuple[Objective, ...]  # the same, with slots for each number of vectors in turn
    fixed: Batch

    @classmethod
    def of(cls, model: DiffusionModel, images: TrainingImages, options: LearnOptions) -> Self:
        fewest = 1 if options.progressive else options.num_vectors
        whole = objective_of(model, images, options, num_vectors=options.num_vectors)
        texts = prompts_of(images, options.learnable_property).texts
        grown = tuple(
            replace(
                whole, prompts=TemplatePrompts.lay_out(model, texts, count).to(model.unet.device)
            )
            for count in range(fewest, options.num_vectors)
        )
        return cls(objectives=(*grown, whole), fixed=whole.draw_evaluation(EVALUATION_BATCH_SIZE))

    def draw(
        self, batch_size: int, generator: torch.Generator, *, num_vectors: int
    ) -> tuple[Part, ...]:
        objective = self._with(num_vectors)
        return (Part(objective=objective, batch=objective.draw(batch_size, generator)),)

    def evaluation(self, *, num_vectors: int) -> tuple[Part, ...]:
        return (Part(objective=self._with(num_vectors), batch=self.fixed),)

    def _with(self, num_vectors: int) -> Objective:
        return next(one for one in self.objectives if one.num_slots == num_vectors)


def prompts_of(images: TrainingImages, learnable_property: LearnableProperty) -> ImagePrompts:
    """The sentences that images of one word are learned with."""
    templates = templates_for(learnable_property)
    return ImagePrompts.of(templates, images.captions, len(images.pixels))


def objective_of(
    model: DiffusionModel, images: TrainingImages, options: LearnOptions, *, num_vectors: int
) -> Objective:
    """The loss of one word of `num_vectors` vectors on its images."""
    prompts = prompts_of(images, options.learnable_property)
    return Objective.of(
        model,
        LatentDistribution.encode(model, images.pixels),
        TemplatePrompts.lay_out(model, prompts.texts, num_vectors),
        choices=prompts.choices,
        masks=images.masks,
    )


def losses_and_gradients(
    runs: Sequence[tuple[Vectors, Sequence[Part]]], *, max_rows: int
) -> list[tuple[float, Vectors]]:
    """For each run the mean loss of its samples and the gradient of that in its own vectors.

    In one pass of the denoiser, but a single run of more than `max_rows` samples in several, which
    are added up: the same to the rounding of sums, in less memory.
    """
    total = sum(len(part) for part in runs[0][1])
    if len(runs) > 1 or total <= max_rows:
        return _in_one_pass(runs)
    ((vectors, parts),) = runs
    pieces = [piece for part in parts for piece in part.split(max_rows)]
    results = [(len(piece) / total, *_in_one_pass([(vectors, [piece])])[0]) for piece in pieces]
    gradient = torch.stack([share * gradient for share, _, gradient in results]).sum(dim=0)
    return [(sum(share * loss for share, loss, _ in results), gradient)]


def _in_one_pass(
    runs: Sequence[tuple[Vectors, Sequence[Part]]],
) -> list[tuple[float, Vectors]]:
    leaves = [vectors.detach().clone().requires_grad_(True) for vectors, _ in runs]
    trials = [
        part.trial(leaf) for leaf, (_, parts) in zip(leaves, runs, strict=True) for part in parts
    ]
    sizes = [sum(len(part) for part in parts) for _, parts in runs]
    means = torch.stack([losses.mean() for losses in joint_losses(trials).split(sizes)])
    gradients = trials[0].objective.gradients(means.sum(), leaves)
    return list(zip(means.tolist(), gradients, strict=True))


def mean_evaluation(vectors: Vectors, parts: Sequence[Part], *, at_once: int) -> float:
    """The mean loss of the samples of all parts."""
    total = sum(len(part) for part in parts)
    return sum((len(part) / total) * part.evaluate(vectors, at_once=at_once) for part in parts)
