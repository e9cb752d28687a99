"""Captions: the words for a subject, set in the sentences that prompts are made of."""

from collections.abc import Sequence

import numpy as np

# The words that prompt lists of Textual Inversion use must be known to the text encoder, too.
_FRAMES = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a good photo of {}",
    "a nice photo of {}",
    "a clean photo of {}",
    "a bright photo of {}",
    "a dark photo of {}",
    "a cropped photo of {}",
    "a close-up photo of {}",
    "a rendering of {}",
    "a rendition of {}",
    "an illustration of {}",
    "a depiction of {}",
    "a painting of {}",
    "a drawing of {}",
    "my {}",
)
_WORKS = (
    "a rendering",
    "a painting",
    "a drawing",
    "a picture",
    "an image",
    "an illustration",
    "a depiction",
    "a rendition",
    "a photo",
)


def new_caption(rng: np.random.Generator, subject: str, style: str, where: str) -> str:
    """A sentence about a subject ("the small fox"); `where` is a phrase or nothing."""
    styled = rng.random() < 0.75
    form = rng.random()
    if styled and form < 0.35:
        work = str(rng.choice(_WORKS))
        sentence = f"{work} of {subject} {where} in the style of {style}"
    elif styled:
        sentence = f"{_framed(rng, subject)} {where} in {style} style"
    else:
        sentence = f"{_framed(rng, subject)} {where}"
    return " ".join(sentence.split())


def relations(one: str, other: str, order: str) -> Sequence[str]:
    """What can be said of a pair; `order` is where the first is: "left", "right" or "above"."""
    if order == "above":
        return (f"{one} above {other}", f"{one} on top of {other}")
    if order == "right":
        return (f"{one} to the right of {other}", f"{one} on the right of {other}")
    return (
        f"{one} and {other}",
        f"{one} next to {other}",
        f"{one} beside {other}",
        f"{one} to the left of {other}",
        f"{one} and {other} side by side",
    )


def _framed(rng: np.random.Generator, subject: str) -> str:
    if rng.random() < 0.45:
        return subject
    frame = str(rng.choice(_FRAMES))
    if frame.startswith("my"):
        subject = subject.removeprefix("the ").removeprefix("a ").removeprefix("an ")
    return frame.format(subject)
