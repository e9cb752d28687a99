"""Warm start: a word is led towards what CLIP sees in the images before the denoiser is asked.

The idea is that of QuickEmbedding (github.com/ethansmith2000/QuickEmbedding): where a text encoder
is half of a CLIP, the other half embeds the images, and vectors whose prompts come to lie near them
are found without the denoiser, by gradients of the text encoder alone.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from trainer.errors import Diverged, LearningError
from trainer.image_guide import ImageGuide, Part, mean_similarity
from trainer.objective import Vectors
from trainer.options import LearnOptions
from trainer.updates import Moments, update_rule


class Warmth(NamedTuple):
    """The similarity of prompts and images, the mean cosine, before a warm start and after it."""

    before: float
    after: float


def warm_started(
    guides: Sequence[ImageGuide],
    vectors: Vectors,
    *,
    steps: int,
    dims: Sequence[int],
    norms: Sequence[float],
    label: str,
) -> tuple[Vectors, Warmth]:
    """The vectors after the warm start, and what it gained.

    `dims` and `norms` are the width of the vectors for each text encoder, and the length that a
    word has there; those for one without an image tower stay as they are. Raises `LearningError` if
    none has one, and `Diverged`; `label` stands before the messages.
    """
    if not guides:
        raise LearningError(
            f"{label}warm_start={steps} needs the image tower of one of the model's text encoders; "
            "give it, or use warm_start=0"
        )
    parts = list(vectors.split(list(dims), dim=1))
    before = mean_similarity(guides, parts)
    for guide in guides:
        place = guide.tower.encoder
        parts[place] = led(guide, parts[place], steps=steps, norm=norms[place], label=label)
    return torch.cat(parts, dim=1), Warmth(before, mean_similarity(guides, parts))


def led(guide: ImageGuide, vectors: Part, *, steps: int, norm: float, label: str = "") -> Part:
    """One text encoder's vectors after so many steps down the distance of prompts and images.

    Adam, its rate and the length of at most a word, `norm`, are those of the default course. Each
    step sees all prompts and images, so nothing is drawn.
    """
    course = LearnOptions(steps=steps)
    rule = update_rule(course, vectors, dims=vectors.shape[1:], norms=(norm,))
    vectors = rule.start(vectors)
    moments = Moments.zeros_like(vectors)
    for step in range(steps):
        loss, gradient = guide.loss_and_gradient(vectors)
        if not (math.isfinite(loss) and gradient.isfinite().all()):
            raise Diverged(
                f"{label}warm start, step {step + 1}: loss {loss} with the text half of "
                f"{guide.tower.name}; its weights overflow or are broken: leave --warm-start out"
            )
        rate = course.rate_at(step)
        vectors, moments = rule(vectors, gradient, moments, step=step + 1, rate=rate)
    return vectors
