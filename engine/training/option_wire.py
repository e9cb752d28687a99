"""The options of learning in the words of the API and back; on both sides of a connection.

A client imports this: nothing of the runtime is needed here.
"""

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from protos.oneword.v1 import training_pb2

# The words of the trainer, in the order of the enum's numbers from 1 on.
LEARNABLE_PROPERTIES = ("object", "style")
OPTIMIZERS = ("adam", "adamw", "dti")
STOP_RULES = ("steps", "dvar")
_OPTIONAL_FIELDS = (
    "steps",
    "batch_size",
    "learning_rate",
    "num_vectors",
    "seed",
    "eval_every",
    "stop_window",
    "stop_threshold",
    "regularization",
    "progressive",
    "per_image_tokens",
    "cross_initialization",
)
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "learnable_property": LEARNABLE_PROPERTIES,
    "optimizer": OPTIMIZERS,
    "stop": STOP_RULES,
}


def options_from_proto(message: training_pb2.LearnOptions) -> dict[str, Any]:
    """What was asked for; what is absent stays absent. Ranges are checked by `check_options`.

    Raises `InvalidRequest` for a number of an enum that this version lacks.
    """
    options: dict[str, Any] = {
        name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)
    }
    if message.initializer_token:
        options["initializer_token"] = message.initializer_token
    if message.initializer_candidates:
        options["initializer_candidates"] = tuple(message.initializer_candidates)
    for name, words in _CHOICES.items():
        if number := getattr(message, name):
            if not 0 < number <= len(words):
                raise _unknown(name, number, words)
            options[name] = words[number - 1]
    return options


def options_to_proto(options: Mapping[str, Any]) -> training_pb2.LearnOptions:
    """The message for options by their names; a choice by its word, or by its number in the enum.

    Raises `InvalidRequest` for a name, word or number that the API cannot carry.
    """
    fields = dict(options)
    for name, words in _CHOICES.items():
        if isinstance(word := fields.get(name), str):
            if word not in words:
                raise _unknown(name, word, words)
            fields[name] = words.index(word) + 1
    known = training_pb2.LearnOptions.DESCRIPTOR.fields_by_name
    if strange := sorted(fields.keys() - known.keys()):
        raise InvalidRequest(
            f"a server cannot be asked for {', '.join(strange)}; leave it out, or learn on this "
            "machine with `oneword learn`",
            field=f"options.{strange[0]}",
        )
    try:
        return training_pb2.LearnOptions(**fields)
    except (TypeError, ValueError) as error:  # out of the range of its type
        raise InvalidRequest(f"options of learning: {error}", field="options") from error


def _unknown(name: str, value: object, words: tuple[str, ...]) -> InvalidRequest:
    return InvalidRequest(
        f"unknown {name} {value!r}; known: {', '.join(words)}", field=f"options.{name}"
    )
