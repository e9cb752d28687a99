"""All measures of one set of pictures by one encoder: names, meanings, and how each is computed.

A measure that cannot be had (no class word, no masks, an encoder that reads no text, one picture a
prompt) is absent, never zero.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from trainer import scores
from trainer.evaluation_prompts import PromptSet

MEASURES = {
    "image_similarity": "mean cosine of pictures of the likeness prompts with training images",
    "image_similarity_of_means": "the same, cosine between the mean embeddings",
    "image_similarity_all_prompts": "mean cosine of pictures of all prompts with training images",
    "image_similarity_masked": "as image_similarity, training images without their background",
    "text_similarity": "mean cosine of pictures with their prompt, the word left out",
    "text_similarity_of_means": "the same, each prompt's mean embedding with its text",
    "text_similarity_class_word": "as text_similarity, the class word in place of the word",
    "text_similarity_class_word_of_means": "the same, of mean embeddings",
    "clip_score": "2.5 max(cosine, 0) of pictures with their prompt, the word left out",
    "clip_score_class_word": "the same, the class word in place of the word",
    "diversity": "1 - mean cosine between pictures of one prompt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardsticks:
    """What pictures of one concept are compared with, as one encoder sees it."""

    training: Float[np.ndarray, "images dim"]
    masked: Float[np.ndarray, "masked_images dim"] | None = None
    texts: Float[np.ndarray, "text_prompts dim"] | None = None  # the word left out
    class_texts: Float[np.ndarray, "text_prompts dim"] | None = None  # the class word put in


def measure(
    samples: Float[np.ndarray, "prompts samples dim"], prompts: PromptSet, yardsticks: Yardsticks
) -> dict[str, float]:
    """Measures of pictures, `samples[i]` those of prompt i, each by its name in `MEASURES`."""
    likeness = _flat(samples[list(prompts.likeness_places)])
    found = {
        "image_similarity": scores.mean_of_cosines(likeness, yardsticks.training),
        "image_similarity_of_means": scores.cosine_of_means(likeness, yardsticks.training),
        "image_similarity_all_prompts": scores.mean_of_cosines(_flat(samples), yardsticks.training),
    }
    if yardsticks.masked is not None:
        found["image_similarity_masked"] = scores.mean_of_cosines(likeness, yardsticks.masked)
    edited = samples[list(prompts.text_places)]
    for suffix, texts in (("", yardsticks.texts), ("_class_word", yardsticks.class_texts)):
        if texts is not None:
            found |= _text_measures(edited, texts, suffix)
    if (diversity := scores.diversity(samples)) is not None:
        found["diversity"] = diversity
    return found


def measure_training_images(yardsticks: Yardsticks) -> dict[str, float]:
    """The upper bound of likeness: training images against each other, none against itself."""
    among = scores.mean_among(yardsticks.training)
    if among is None:
        return {}
    found = {"image_similarity": among, "image_similarity_all_prompts": among}
    masked = None if yardsticks.masked is None else scores.mean_among(yardsticks.masked)
    if masked is not None:
        found["image_similarity_masked"] = masked
    for suffix, texts in (("", yardsticks.texts), ("_class_word", yardsticks.class_texts)):
        if texts is not None:
            repeated = np.broadcast_to(
                yardsticks.training, (len(texts), *yardsticks.training.shape)
            )
            found |= _text_measures(repeated, texts, suffix)
    return {**found, "diversity": 1.0 - among}


def _text_measures(
    samples: Float[np.ndarray, "prompts samples dim"],
    texts: Float[np.ndarray, "prompts dim"],
    suffix: str,
) -> dict[str, float]:
    cosines = scores.paired_cosines(samples, texts)
    return {
        f"text_similarity{suffix}": float(cosines.mean()),
        f"text_similarity{suffix}_of_means": scores.paired_cosine_of_means(samples, texts),
        f"clip_score{suffix}": scores.clip_score(cosines),
    }


def _flat(samples: Float[np.ndarray, "prompts samples dim"]) -> Float[np.ndarray, "count dim"]:
    return samples.reshape(-1, samples.shape[-1])
