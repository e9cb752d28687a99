"""The image towers of `oneword learn`: their flag, and what is left out where there is none."""

import argparse
import dataclasses
from collections.abc import Sequence

from trainer.errors import LearningError
from trainer.options import AUTO, LearnOptions


def add_tower_option(parser: argparse.ArgumentParser) -> None:
    """Declare `--image-tower`."""
    parser.add_argument(
        "--image-tower", action="append", metavar="MODEL", default=[],
        help="the CLIP, folder or hub id, whose text half is a text encoder of the model: ranks "
        "initializers, and is what --warm-start needs; once for each text encoder (none)",
    )  # fmt: skip


def guided(options: LearnOptions, towers: Sequence[str]) -> LearnOptions:
    """The options without what needs an image tower, where there is none; says so."""
    missed = ["no warm start"] if options.warm_start else []
    if options.initializer_token == AUTO:
        missed.append("initializers are compared by the loss alone")
    if towers and not missed:
        raise LearningError(
            f"--image-tower does nothing without --warm-start STEPS or --initializer-token {AUTO}; "
            "add one of them, or leave it out"
        )
    if towers or not missed:
        return options
    print(f"no image tower: {', and '.join(missed)}; --image-tower names the model's CLIP")
    return dataclasses.replace(options, warm_start=0)
