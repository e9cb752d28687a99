"""What `oneword learn` says: of the images, while it learns, and of what came out."""

import sys

from tqdm import tqdm

from engine.printing import printable
from trainer.images import TrainingImages
from trainer.run import LearnState


def report_images(images: TrainingImages, size: int) -> None:
    names = ", ".join(map(printable, images.names))
    print(f"{len(images.names)} images, {size} x {size} pixels: {names}")
    if images.masked:
        print(f"  learned only where their masks are: {', '.join(map(printable, images.masked))}")
    for name, captions in zip(images.names, images.captions, strict=False):
        if captions:
            print(f"  {printable(name)}: its captions ({len(captions)}) instead of the templates")
    for name in images.upscaled:
        print(
            f"  {printable(name)} is below {size} pixels and was enlarged; a larger one is better"
        )
    for file in images.skipped:
        print(f"  skipped {printable(file.name)}: {file.reason}")


def report_start(state: LearnState, label: str) -> None:
    """What was found out before the first step."""
    if state.initializers:
        words = ", ".join(f"{printable(word)} {loss:.4f}" for word, loss in state.initializers)
        tqdm.write(
            f"{label}starts from the first of these words (with their evaluation losses): {words}"
        )
    if state.warmth:
        tqdm.write(
            f"{label}warm start: similarity of prompts and images {state.warmth.before:.4f} -> "
            f"{state.warmth.after:.4f}"
        )


def report_rollback(state: LearnState, label: str) -> None:
    tqdm.write(
        f"{label}a loss was not a number: back at step {state.step}, learning rate halved "
        f"({state.rollbacks} times so far)",
        file=sys.stderr,
    )


def warn_nothing_learned(placeholder_token: str) -> None:
    print(
        f"nothing was learned: no evaluation was better than the one before the first step, so "
        f"{placeholder_token} is still its initializer; lower --learning-rate or give more "
        "--steps",
        file=sys.stderr,
    )
