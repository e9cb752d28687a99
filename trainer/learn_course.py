"""The flags of `oneword learn` about the course of a run: what is shown, kept, and preferred."""

import argparse
from pathlib import Path

from trainer.encoders import DEFAULT_ENCODER, Encoder, default_encoder, open_encoder
from trainer.errors import LearningError
from trainer.tradeoff import PREFERENCES


def add_course_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument(
        "--prefer", choices=PREFERENCES,
        help="draw the vectors of each evaluation, and take those that suit this instead "
        "of the last",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", metavar="FOLDER_OR_ID",
        help=f"what judges for --prefer: the evaluator or a CLIP ({DEFAULT_ENCODER})",
    )  # fmt: skip
    parser.add_argument(
        "--keep-checkpoints", type=Path, metavar="FOLDER",
        help="write the vectors of each evaluation as concept files as well",
    )  # fmt: skip
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write numbers of each step as events"
    )


def encoder_of(arguments: argparse.Namespace) -> Encoder | None:
    """The encoder that `--prefer` needs; raises `LearningError` for one that has nothing to do."""
    if arguments.prefer:
        return open_encoder(arguments.encoder or default_encoder(), device=arguments.device)
    if arguments.encoder:
        raise LearningError("--encoder judges for --prefer; add --prefer faithful or editable")
    return None
