"""Presets: the variants that the paper compares, by name (Gal et al. 2022, section 5).

A preset sets fields of `LearnOptions`. Those named `paper...` also learn as the authors' code does;
the others change the default course in one thing, and can follow `paper` to be the paper's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.errors import LearningError
from trainer.options import LearnOptions

# The authors' code multiplies its base rates by batch size and number of GPUs.
_LOW_RATE, _HIGH_RATE = 1e-4, 2e-2
_PAPER = {"optimizer": "adamw", "steps": 5000, "batch_size": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A variant: what it does, in words and as options."""

    summary: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields of LearnOptions
    rate_per_sample: float | None = None  # times batch_size is the learning rate
    needs_captions: bool = False


PRESETS: Mapping[str, Preset] = {
    "paper": Preset(summary="AdamW, 5000 steps of 8, rate 5e-3 x batch size", options=_PAPER),
    "paper-low-lr": Preset(
        summary="the same, rate 1e-4 x batch size", options=_PAPER, rate_per_sample=_LOW_RATE
    ),
    "paper-high-lr": Preset(
        summary="the same, rate 2e-2 x batch size", options=_PAPER, rate_per_sample=_HIGH_RATE
    ),
    "2-vectors": Preset(summary="2 vectors", options={"num_vectors": 2}),
    "3-vectors": Preset(summary="3 vectors", options={"num_vectors": 3}),
    "progressive": Preset(
        summary="3 vectors that join one after another",
        options={"num_vectors": 3, "progressive": True},
    ),
    "regularized": Preset(
        summary="pulled back to the initializer, weight 0.1", options={"regularization": 0.1}
    ),
    "per-image-tokens": Preset(
        summary="each image has a vector of its own beside the word's",
        options={"per_image_tokens": True},
    ),
    "human-captions": Preset(
        summary="learned with captions, which every image must have", needs_captions=True
    ),
    "style": Preset(summary="templates of a style", options={"learnable_property": "style"}),
}


def preset_options(names: Sequence[str], given: Mapping[str, Any]) -> LearnOptions:
    """The options of presets, later over earlier ones, and over all of them what is `given`.

    Raises `LearningError` for an unknown preset, and for options that cannot be.
    """
    chosen: dict[str, Any] = {}
    rate_per_sample: float | None = None
    for name in names:
        if name not in PRESETS:
            raise LearningError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        preset = PRESETS[name]
        chosen |= preset.options
        if "optimizer" in preset.options:  # whose rate comes with it
            rate_per_sample = preset.rate_per_sample
    options = LearnOptions(**{**chosen, **given})
    if rate_per_sample is None or "learning_rate" in given:
        return options
    return replace(options, learning_rate=min(rate_per_sample * options.batch_size, 1.0))


def check_captions(names: Sequence[str], captioned: Mapping[str, bool]) -> None:
    """Raise `LearningError` where a preset needs captions and an image, by its name, has none."""
    if not any(PRESETS[name].needs_captions for name in names):
        return
    without = [name for name, has_some in captioned.items() if not has_some]
    if without:
        raise LearningError(
            f"--preset human-captions needs captions for every image; {len(without)} of "
            f"{len(captioned)} have none, such as {without[0]}: write them into a text file of "
            "the same name beside each, as in cat.txt for cat.jpg, one sentence a line with {} "
            "where the word goes"
        )
