"""The flags of `oneword learn` that decide what is learned: the fields of `LearnOptions`."""

import argparse
from typing import get_args

from trainer.options import AUTO, LearnOptions, Optimizer, StopRule
from trainer.templates import LearnableProperty

_DEFAULTS = LearnOptions()


def add_learn_options(parser: argparse.ArgumentParser) -> None:
    """Declare an option for each field of `LearnOptions`."""
    parser.add_argument(
        "--initializer-token",
        metavar="TEXT",
        help=f"a word or phrase close to the images; {AUTO!r} searches for one (the mean of the "
        "vocabulary)",
    )
    parser.add_argument(
        "--initializer-candidates",
        type=_words,
        metavar="A,B,C",
        default=_DEFAULTS.initializer_candidates,
        help=f"what --initializer-token {AUTO} chooses from (words of the vocabulary)",
    )
    for name, choices, what in (
        ("learnable-property", get_args(LearnableProperty), "what the images share"),
        ("optimizer", get_args(Optimizer), "how the vectors move"),
        ("stop", get_args(StopRule), "after the last step, or when the loss has settled"),
    ):
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", choices=choices, default=default, help=f"{what} (%(default)s)"
        )
    parser.add_argument("--learning-rate", type=float, metavar="X", help="(depends on --optimizer)")
    for name, type_, what in (
        ("num-vectors", int, "length of the new word in tokens"),
        ("steps", int, "steps to learn, at most"),
        ("batch-size", int, "samples in a step"),
        ("seed", int, "of all random draws"),
        ("eval-every", int, "steps between two evaluations on fixed noise"),
        ("stop-window", int, "evaluations that must have settled for --stop dvar"),
        ("stop-threshold", float, "of their variance, relative to that of all evaluations"),
        ("timestep-focus", float, "share of the timesteps that is biased to noise"),
    ):
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        metavar = "N" if type_ is int else "X"
        parser.add_argument(
            f"--{name}", type=type_, metavar=metavar, default=default, help=f"{what} (%(default)s)"
        )
    parser.add_argument(
        "--antithetic", action="store_true", help="samples in pairs of opposite noise"
    )


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} has no candidate; give words such as cat,dog")
    return words
