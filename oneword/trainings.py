"""`oneword trainings`: have a server learn words from images on this machine.

A training outlives the command that made it: what is watched here goes on without being watched.
"""

import argparse
import dataclasses
import sys
from datetime import UTC
from pathlib import Path
from typing import Any

from engine.client.retries import RetryPolicy
from engine.errors import InvalidRequest
from engine.files import write_atomically
from engine.printing import printable
from oneword.connection import add_server_action, connect
from oneword.image_folder import ImageFolder, read_image_folder
from oneword.training_display import INTERRUPTED, command_line, follow, state_name
from protos.oneword.v1 import training_pb2
from trainer.learn_arguments import add_learn_options, options_from
from trainer.options import LearnOptions
from trainer.presets import check_captions

_DEFAULT_PREVIEW_EVERY = 50
# Whoever watches is told soon that the server is gone, and how to go on.
_RETRY = RetryPolicy(max_outage_s=5.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each thing that can be done with a training."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_create(actions.add_parser("create", help="send images and have a word learned from them"))
    watch = actions.add_parser("watch", help="follow a training to its end")
    _add_id(watch)
    _add_previews(watch)
    add_server_action(watch, _watch)
    add_server_action(actions.add_parser("list", help="list the trainings of a server"), _list)
    for name, summary, action in (
        ("cancel", "stop a training; what it has learned is given up", _cancel),
        ("delete", "forget a training that has ended; its concept stays", _delete),
    ):
        subparser = actions.add_parser(name, help=summary)
        _add_id(subparser)
        add_server_action(subparser, action)
    export = actions.add_parser("export", help="fetch what was learned as a concept file")
    _add_id(export)
    export.add_argument("--output", type=Path, required=True)
    add_server_action(export, _export)


def run(arguments: argparse.Namespace) -> int:
    return arguments.action(arguments)


def _add_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("training_id", metavar="ID", help="as `create` and `list` print it")


def _add_previews(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--previews", type=Path, metavar="FOLDER", help="write the previews there (not at all)"
    )


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder with 3 to 5 images")
    parser.add_argument("--placeholder-token", required=True, help="the new word, such as '<cat>'")
    add_learn_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a concept of this name")
    parser.add_argument(
        "--preview-every",
        type=int,
        metavar="N",
        help=f"have previews drawn every N steps (with --previews {_DEFAULT_PREVIEW_EVERY}, else "
        "never)",
    )
    _add_previews(parser)
    parser.add_argument("--detach", action="store_true", help="do not watch it")
    add_server_action(parser, _create)


def _create(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    folder = read_image_folder(arguments.images, arguments.placeholder_token)
    _report(folder)
    check_captions(arguments.presets, {name: name in folder.captions for name in folder.images})
    with connect(arguments, retry=_RETRY) as client:
        try:
            training = client.training.create(
                arguments.placeholder_token,
                folder.images,
                masks=folder.masks,
                captions=folder.captions,
                overwrite=arguments.overwrite,
                preview_every_steps=_preview_every(arguments),
                **options,
            )
        except KeyboardInterrupt:
            listing = command_line("list", arguments.server)
            print(f"interrupted while sending; see with: {listing}", file=sys.stderr)
            return INTERRUPTED
        print(f"training {printable(training.training_id)}", flush=True)
        if arguments.detach:
            print(command_line("watch", arguments.server, training.training_id))
            return 0
        return follow(client, arguments.server, training.training_id, arguments.previews)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What differs from the defaults; the rest is for the server to choose."""
    given, default = options_from(arguments), LearnOptions()
    names = [field.name for field in dataclasses.fields(LearnOptions)]
    changed = [name for name in names if getattr(given, name) != getattr(default, name)]
    return {name: getattr(given, name) for name in changed}


def _preview_every(arguments: argparse.Namespace) -> int:
    every = arguments.preview_every
    if every is None:
        return _DEFAULT_PREVIEW_EVERY if arguments.previews else 0
    if every < 1:
        raise InvalidRequest(f"--preview-every must be at least 1, got {every}")
    return every


def _report(folder: ImageFolder) -> None:
    print(f"{len(folder.images)} images: {', '.join(map(printable, folder.images))}")
    if folder.masks:
        print(f"  with masks: {', '.join(map(printable, folder.masks))}")
    if folder.captions:
        print(f"  with captions: {', '.join(map(printable, folder.captions))}")
    for name, reason in folder.skipped.items():
        print(f"  skipped {printable(name)}: {printable(reason)}")


def _watch(arguments: argparse.Namespace) -> int:
    with connect(arguments, retry=_RETRY) as client:
        return follow(client, arguments.server, arguments.training_id, arguments.previews)


def _list(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        for training in client.training.list():
            print(_line(training))
    return 0


def _line(training: training_pb2.Training) -> str:
    created = training.create_time.ToDatetime(UTC).astimezone().isoformat(" ", "seconds")
    steps = f"{training.progress.step}/{training.progress.steps}"
    return (
        f"{printable(training.training_id)} {state_name(training.state):<10} {steps:>11} "
        f"{created} {printable(training.spec.placeholder_token)}"
    )


def _cancel(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        training = client.training.cancel(arguments.training_id)
    print(f"{printable(training.training_id)} {state_name(training.state)}")
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        client.training.delete(arguments.training_id)
    print(f"{arguments.training_id} deleted")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        response = client.training.get(arguments.training_id)
    if not response.concept_file:
        state = state_name(response.training.state)
        raise InvalidRequest(
            f"training {arguments.training_id} is {state} and has no concept; there is one when "
            "it has succeeded"
        )
    write_atomically(arguments.output, response.concept_file)
    print(printable(arguments.output))
    return 0
