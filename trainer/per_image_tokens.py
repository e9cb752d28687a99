"""Per-image tokens: beside the word, each image has a vector that only it is described with.

What is special to an image can go there, and leave the word to what the images share (Gal et al.
2022, section 5). The images' own vectors are dropped at the end.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from trainer.images import TrainingImages
from trainer.material import EVALUATION_BATCH_SIZE, Part, objective_of, prompts_of
from trainer.model import DiffusionModel
from trainer.objective import Batch, Objective
from trainer.options import LearnOptions
from trainer.splicing import TemplatePrompts

# Of the samples have the sentence with both: `mixing_prob` in the authors' code.
OWN_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class PerImageTokens:
    """One word and its images; behind the word's vectors stand those of the images in turn.

    Evaluation has the word alone, as it will be used.
    """

    word: Objective
    with_own: Objective  # the same sentences, each with the image's own vector at its end
    fixed: Batch

    @classmethod
    def of(cls, model: DiffusionModel, images: TrainingImages, options: LearnOptions) -> Self:
        word = objective_of(model, images, options, num_vectors=options.num_vectors)
        texts = prompts_of(images, options.learnable_property).texts
        both = TemplatePrompts.lay_out(
            model, [f"{text} with {{}}" for text in texts], options.num_vectors, 1
        )
        return cls(
            word=word,
            with_own=replace(word, prompts=both.to(model.unet.device)),
            fixed=word.draw_evaluation(EVALUATION_BATCH_SIZE),
        )

    def draw(
        self, batch_size: int, generator: torch.Generator, *, num_vectors: int
    ) -> tuple[Part, ...]:
        batch = self.word.draw(batch_size, generator)
        own = self._with_own(batch_size, generator)
        alone, described = batch.take(torch.where(~own)[0]), batch.take(torch.where(own)[0])
        parts = (
            Part(objective=self.word, batch=alone, rows=self._shared),
            Part(objective=self.with_own, batch=described, rows=self._rows(described.images)),
        )
        return tuple(part for part in parts if len(part))

    def evaluation(self, *, num_vectors: int) -> tuple[Part, ...]:
        return (Part(objective=self.word, batch=self.fixed, rows=self._shared),)

    @property
    def _shared(self) -> Int64[Tensor, " num_vectors"]:
        return torch.arange(self.word.num_slots)

    def _rows(self, images: Int64[Tensor, " batch"]) -> Int64[Tensor, "batch slots"]:
        shared = self._shared.expand(len(images), -1)
        return torch.cat([shared, self.word.num_slots + images[:, None]], dim=1)

    def _with_own(self, batch_size: int, generator: torch.Generator) -> Bool[Tensor, " batch"]:
        """Which samples have the sentence with both."""
        return torch.rand(batch_size, generator=generator) < OWN_SHARE
