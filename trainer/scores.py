"""The paper's measures, on embeddings: pure functions, float64, no model.

Textual Inversion (arXiv 2208.01618, section 5) compares pictures with pictures and pictures with
text by cosines. Two readings are in use and both are here. With unit vectors a_i, b_j and their
means A, B:

    mean of cosines = mean over all i, j of a_i . b_j = A . B
    cosine of means = A . B / (|A| |B|)

|A| and |B| are at most 1, so the second is never the smaller in magnitude; they agree where all
vectors of each side are the same. The more the pictures differ, the further apart the two readings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from trainer.evaluation_errors import EvaluationError

CLIP_SCORE_WEIGHT = 2.5  # CLIPScore (arXiv 2104.08718), w
_SHORTEST = 1e-12

Embeds = Float[np.ndarray, "count dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A measure over several seeds or concepts."""

    mean: float
    std: float | None  # of the sample (n - 1); None for a single value
    lowest: float
    highest: float
    count: int


def unit_rows(embeds: Embeds) -> Float64[np.ndarray, "count dim"]:
    """The rows at length 1.

    Raises `EvaluationError` for rows that have no direction: zero, NaN or infinite.
    """
    rows = np.asarray(embeds, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths < _SHORTEST).any():
        place = int(np.argmin(np.isfinite(lengths) & (lengths >= _SHORTEST)))
        raise EvaluationError(
            f"embedding {place} of {len(rows)} has length {lengths[place, 0]:g} and so no "
            "direction; the encoder's weights are broken, or it was fed something that it cannot "
            "read"
        )
    return rows / lengths


def mean_of_cosines(one: Embeds, other: Embeds) -> float:
    """The mean cosine over all pairs: CLIP-I and DINO of DreamBooth (arXiv 2208.12242) too."""
    return float(_mean(one) @ _mean(other))


def cosine_of_means(one: Embeds, other: Embeds) -> float:
    """The cosine between the mean unit vectors of both sides."""
    means = unit_rows(np.stack([_mean(one), _mean(other)]))
    return float(means[0] @ means[1])


def mean_among(embeds: Embeds) -> float | None:
    """The mean cosine over all pairs of different rows; None for fewer than two rows.

    A row with itself is left out: it would lift the mean by 1/n, and a small set most of all.
    """
    count = len(embeds)
    if count < 2:
        return None
    total = unit_rows(embeds).sum(axis=0)
    return float((total @ total - count) / (count * (count - 1)))


def diversity(samples: Float[np.ndarray, "prompts samples dim"]) -> float | None:
    """1 - mean cosine between samples of one prompt, over prompts; None for one sample each.

    0 where a prompt always gives the same picture, as a copied training image does.
    """
    within = [mean_among(of_prompt) for of_prompt in samples]
    known = [value for value in within if value is not None]
    return 1.0 - sum(known) / len(known) if known else None


def paired_cosines(
    samples: Float[np.ndarray, "prompts samples dim"], texts: Float[np.ndarray, "prompts dim"]
) -> Float64[np.ndarray, "prompts samples"]:
    """The cosine of each sample with the text of its own prompt."""
    units = unit_rows(samples.reshape(-1, samples.shape[-1])).reshape(samples.shape)
    return np.einsum("psd,pd->ps", units, unit_rows(texts))


def paired_cosine_of_means(
    samples: Float[np.ndarray, "prompts samples dim"], texts: Float[np.ndarray, "prompts dim"]
) -> float:
    """For each prompt the cosine of its samples' mean with its text; the mean over prompts."""
    means = np.stack([_mean(of_prompt) for of_prompt in samples])
    return float((unit_rows(means) * unit_rows(texts)).sum(axis=1).mean())


def clip_score(cosines: Float64[np.ndarray, "prompts samples"]) -> float:
    """CLIP-T as CustomConcept101 prints it: 2.5 max(cosine, 0), averaged after the clipping."""
    return float((CLIP_SCORE_WEIGHT * np.maximum(cosines, 0.0)).mean())


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of a measure; at least one value."""
    if not values:
        raise EvaluationError("there is nothing to average; give at least one seed or concept")
    return Spread(
        mean=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        lowest=float(min(values)),
        highest=float(max(values)),
        count=len(values),
    )


def _mean(embeds: Embeds) -> Float64[np.ndarray, " dim"]:
    if not len(embeds):
        raise EvaluationError("no picture to compare; give at least one on both sides")
    return unit_rows(embeds).mean(axis=0)
