"""What a learned vector is worth: one judgement for words of every origin."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from benchmarks.peers import MODEL, ROOT
from models.recipe.exam import Examiner
from models.recipe.inversions import COLOUR_PROMPTS, NEUTRAL_PROMPTS, read_levels
from models.recipe.objects import COLOURS, with_article
from trainer.evaluator import Evaluator, mean_similarity
from trainer.images import TrainingImages, read_images
from trainer.material import OwnImages
from trainer.model import DiffusionModel, load_model
from trainer.objective import Batch, Objective
from trainer.options import LearnOptions
from trainer.precision import Precision, unet_dtype
from trainer.sampling import image_size, sample_images
from trainer.splicing import as_concept

CONCEPTS = ROOT / "examples" / "concepts"
EVALUATOR = ROOT / "models" / "evaluator"
SAMPLES = 256  # of the loss; others than those by which a run chooses its best vectors
STEPS, GUIDANCE_SCALE = 25, 4.0
COMPANIONS = ("cat", "dog", "bird", "penguin", "mushroom", "cactus", "rose", "pizza", "house",
              "bicycle", "umbrella", "robot")  # fmt: skip
_SEED = 1
_TOKEN = "<word>"

Vectors = Float32[Tensor, "num_vectors dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A word, judged."""

    loss: float  # mean over `SAMPLES` fixed samples
    similarity: float  # mean cosine of eight neutral pictures to the images
    edited_similarity: float  # the same of pictures on sixteen coloured backgrounds
    colours: float  # share of those backgrounds that are there
    companions: float  # share of twelve second objects that are there
    norm: float  # of the longest vector


@dataclass(frozen=True)
class Judge:
    """The embedded model, its evaluator and one folder of images."""

    concept: str
    precision: Precision = "float32"  # of the denoiser, in learning; judged in float32

    @cached_property
    def learner(self) -> DiffusionModel:
        """The model as a run has it."""
        return load_model(str(MODEL), unet_dtype=unet_dtype(self.precision, "cpu"))

    @cached_property
    def model(self) -> DiffusionModel:
        return load_model(str(MODEL))

    @cached_property
    def examiner(self) -> Examiner:
        return Examiner(Evaluator.open(EVALUATOR))

    @property
    def folder(self) -> Path:
        return CONCEPTS / self.concept

    @torch.no_grad()
    def loss(self, vectors: Vectors) -> float:
        """The denoising loss on samples that no run has seen."""
        return self._objective(len(vectors)).evaluate(vectors, self._samples, at_once=64)

    @cached_property
    def images(self) -> TrainingImages:
        return read_images(self.folder, size=image_size(self.model))

    @cached_property
    def _objectives(self) -> dict[int, Objective]:
        return {}

    def _objective(self, num_vectors: int) -> Objective:
        """The loss of words of so many vectors."""
        if num_vectors not in self._objectives:
            options = LearnOptions(num_vectors=num_vectors)
            own = OwnImages.of(self.model, self.images, options)
            self._objectives[num_vectors] = own.objectives[-1]
        return self._objectives[num_vectors]

    @cached_property
    def _samples(self) -> Batch:
        return self._objective(1).draw(SAMPLES, torch.Generator().manual_seed(_SEED))

    def judge(self, vectors: Vectors) -> Judgement:
        """Draw the word and mark what was drawn."""
        prompts = [
            *NEUTRAL_PROMPTS,
            *COLOUR_PROMPTS,
            *(f"{{}} and {with_article(noun)}" for noun in COMPANIONS),
        ]
        word = as_concept(self.model, vectors, placeholder_token=_TOKEN)
        size = image_size(self.model)
        drawn = sample_images(
            self.model,
            [word],
            [prompt.format(_TOKEN) for prompt in prompts],
            size=size,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
        )
        embeds = self.examiner.evaluator.image_embeds([np.asarray(picture) for picture in drawn])
        first, second = len(NEUTRAL_PROMPTS), len(NEUTRAL_PROMPTS) + len(COLOUR_PROMPTS)
        neutral, coloured, joined = np.split(embeds, [first, second])
        references = self.examiner.evaluator.image_embeds(read_levels(self.folder, size))
        colours = self.examiner.colours_found(coloured)
        best_two = np.argsort(-self.examiner.noun_logits(joined), axis=1)[:, :2]
        seen = [
            noun in {self.examiner.nouns[place] for place in row}
            for noun, row in zip(COMPANIONS, best_two, strict=True)
        ]
        return Judgement(
            loss=round(self.loss(vectors), 5),
            similarity=round(float(mean_similarity(neutral, references)), 4),
            edited_similarity=round(float(mean_similarity(coloured, references)), 4),
            colours=sum(a == b for a, b in zip(colours, COLOURS, strict=True)) / len(COLOURS),
            companions=sum(seen) / len(seen),
            norm=round(vectors.norm(dim=1).max().item(), 3),
        )
