"""The flags of `oneword learn` that decide what is learned: the fields of `LearnOptions`.

A flag that is not given leaves nothing among the parsed arguments, so that presets can tell it from
one that is given with its default.
"""

import argparse
import dataclasses
from typing import get_args

from trainer.options import AUTO, LearnOptions, Optimizer, StopRule
from trainer.presets import PRESETS, preset_options
from trainer.templates import LearnableProperty

_DEFAULTS = LearnOptions()


def add_learn_options(parser: argparse.ArgumentParser) -> None:
    """Declare an option for each field of `LearnOptions`, and the presets of them."""
    _add_presets(parser)
    options = parser.add_argument_group("what is learned", argument_default=argparse.SUPPRESS)
    options.add_argument(
        "--initializer-token",
        metavar="TEXT",
        help=f"a word or phrase close to the images; {AUTO!r} searches for one (the mean of the "
        "vocabulary)",
    )
    options.add_argument(
        "--initializer-candidates",
        type=_words,
        metavar="A,B,C",
        help=f"what --initializer-token {AUTO} chooses from (words of the vocabulary)",
    )
    for name, choices, what in (
        ("learnable-property", get_args(LearnableProperty), "what the images share"),
        ("optimizer", get_args(Optimizer), "how the vectors move"),
        ("stop", get_args(StopRule), "after the last step, or when the loss has settled"),
    ):
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        options.add_argument(f"--{name}", choices=choices, help=f"{what} ({default})")
    options.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help="absolute (by --optimizer and a word's length)",
    )
    options.add_argument(
        "--regularization",
        type=float,
        metavar="X",
        help="weight of the pull back to the start (0; 1e-5 with --cross-initialization)",
    )
    for name, type_, what in (
        ("num-vectors", int, "length of the new word in tokens"),
        ("steps", int, "steps to learn, at most"),
        ("batch-size", int, "samples in a step"),
        ("seed", int, "of all random draws"),
        ("warm-start", int, "steps towards what --image-tower sees, before the first step"),
        ("eval-every", int, "steps between two evaluations on fixed noise"),
        ("stop-window", int, "evaluations that must have settled for --stop dvar"),
        ("stop-threshold", float, "of their variance, relative to that of all evaluations"),
    ):
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        metavar = "N" if type_ is int else "X"
        options.add_argument(f"--{name}", type=type_, metavar=metavar, help=f"{what} ({default})")
    for name, what in (
        ("progressive", "let the vectors join one after another, at equal parts of the run"),
        ("per-image-tokens", "a vector of its own for each image, dropped at the end"),
        ("cross-initialization", "start at the text encoder's output for the initializer"),
    ):
        options.add_argument(f"--{name}", action="store_const", const=True, help=what)


def _add_presets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        dest="presets",
        action="append",
        choices=PRESETS,
        default=[],
        metavar="NAME",
        help="settings to begin with, which other options overrule; can be repeated. "
        + "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items()),
    )


def options_from(arguments: argparse.Namespace) -> LearnOptions:
    """What the parsed arguments say: the presets, and over them the options that were given."""
    names = [field.name for field in dataclasses.fields(LearnOptions)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return preset_options(arguments.presets, given)


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} has no candidate; give words such as cat,dog")
    return words
