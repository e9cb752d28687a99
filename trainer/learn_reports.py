"""What `oneword learn` says: of the images, while it learns, and of what came out."""

import sys
from collections.abc import Sequence

from tqdm import tqdm

from engine.printing import printable
from trainer.images import TrainingImages
from trainer.initializer_search import RankedWord
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


def report_initializers(initializers: Sequence[RankedWord], label: str) -> None:
    words = ", ".join(f"{printable(word)} {loss:.4f}" for word, loss in initializers)
    tqdm.write(
        f"{label}starts from the first of these words (with their evaluation losses): {words}"
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
