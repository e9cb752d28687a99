"""The options of learning that a caller may choose, checked by field.

They carry the names that `trainer.options.LearnOptions` gives them. Only those that were asked for
are there: the others take the defaults of the trainer, which this package cannot import.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.concepts import MAX_NUM_VECTORS
from engine.errors import InvalidRequest

AUTO = "auto"  # as initializer_token: search for it
MAX_LEARN_SEED = 2**63 - 1  # what torch.Generator takes
MAX_INITIALIZER_CHARACTERS = 200
MAX_CANDIDATES = 512
MAX_STEPS_BETWEEN = 100_000
MAX_STOP_WINDOW = 1000
# Of numbers that are no counts: what must hold, which nothing does for NaN, and how to say it.
_NUMBERS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda value: 0.0 < value <= 1.0, "above 0 and at most 1"),
    "stop_threshold": (lambda value: 0.0 < value < 1.0, "above 0 and below 1"),
    "regularization": (lambda value: 0.0 <= value < math.inf, "finite and at least 0"),
}


def check_options(options: Mapping[str, Any], *, max_steps: int, max_batch_size: int) -> None:
    """Raise `InvalidRequest`, naming the field, for what cannot be learned with."""
    for name, smallest, largest in (
        ("steps", 1, max_steps),
        ("batch_size", 1, max_batch_size),
        ("num_vectors", 1, MAX_NUM_VECTORS),
        ("seed", 0, MAX_LEARN_SEED),
        ("eval_every", 1, MAX_STEPS_BETWEEN),
        ("stop_window", 2, MAX_STOP_WINDOW),
    ):
        if name in options and not smallest <= (value := options[name]) <= largest:
            raise InvalidRequest(
                f"{name} must be between {smallest} and {largest}, got {value}",
                field=f"options.{name}",
            )
    for name, (holds, words) in _NUMBERS.items():
        if name in options and not holds(value := options[name]):
            raise InvalidRequest(f"{name} must be {words}, got {value}", field=f"options.{name}")
    if options.get("cross_initialization") and options.get("optimizer") == "dti":
        raise InvalidRequest(
            "cross_initialization starts longer than any word, and optimizer dti holds a word's "
            "length; use adam or adamw, or leave cross_initialization out",
            field="options.cross_initialization",
        )
    _check_progressive(options)
    initializer = options.get("initializer_token", "")
    _check_phrase("initializer_token", initializer)
    _check_candidates(options.get("initializer_candidates", ()), initializer)


def _check_progressive(options: Mapping[str, Any]) -> None:
    if not options.get("progressive"):
        return
    if (count := options.get("num_vectors", 1)) < 2:
        raise InvalidRequest(
            f"progressive needs at least 2 vectors: num_vectors is {count}",
            field="options.num_vectors",
        )
    if options.get("per_image_tokens") or options.get("stop", "steps") != "steps":
        raise InvalidRequest(
            "progressive cannot be combined with per_image_tokens or another stop than after the "
            "last step; choose one",
            field="options.progressive",
        )


def _check_candidates(candidates: Sequence[str], initializer: str) -> None:
    if candidates and initializer != AUTO:
        raise InvalidRequest(
            f"initializer_candidates are for a search: initializer_token must be {AUTO!r}; give "
            "that, or leave them out",
            field="options.initializer_candidates",
        )
    if len(candidates) > MAX_CANDIDATES:
        raise InvalidRequest(
            f"there are {len(candidates)} initializer_candidates, the limit is {MAX_CANDIDATES}; "
            "leave some out, or all: the words of the vocabulary are searched then",
            field="options.initializer_candidates",
        )
    for index, candidate in enumerate(candidates):
        if not candidate.strip():
            raise InvalidRequest(
                f"candidate {index} is empty; give a word, or leave it out",
                field="options.initializer_candidates",
            )
        _check_phrase("initializer_candidates", candidate)


def _check_phrase(name: str, text: str) -> None:
    if len(text) > MAX_INITIALIZER_CHARACTERS:
        raise InvalidRequest(
            f"{name} has {len(text)} characters, the limit is {MAX_INITIALIZER_CHARACTERS}; give "
            "a word or a short phrase",
            field=f"options.{name}",
        )
