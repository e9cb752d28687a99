"""A training of a server on the terminal: its progress, its previews, its end."""

import shlex
import sys
from pathlib import Path
from typing import Any

import grpc
from tqdm import tqdm

from engine.client import Client, ServerError
from engine.errors import OneWordError
from engine.files import write_atomically
from engine.printing import printable
from protos.oneword.v1 import training_pb2

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
_PREFIX = "TRAINING_STATE_"


class TrainingEndedBadly(OneWordError):
    """A training has failed, or was cancelled."""


def state_name(state: int) -> str:
    """A state as a word; one that a later version has added as its number."""
    names = {int(value): name for name, value in training_pb2.TrainingState.items()}
    return names.get(state, str(state)).removeprefix(_PREFIX).lower()


def command_line(action: str, server: str, *words: str, command: str = "trainings") -> str:
    """A command that goes on where this one ends, to be copied by the user."""
    return printable(shlex.join(["oneword", command, action, *words, "--server", server]))


def follow(client: Client, server: str, training_id: str, previews: Path | None) -> int:
    """Show a training until it has ended; returns the exit code.

    Ctrl-C asks whether to cancel it; without a terminal it goes on.

    Errors:
        TrainingEndedBadly: with the reason.
        ServerError: the server cannot be watched (any more).
    """
    named = printable(training_id)
    if previews is not None:
        previews.mkdir(parents=True, exist_ok=True)
    try:
        training = _show(client, training_id, previews)
        return _conclude(client, server, training)
    except KeyboardInterrupt:
        if _wants_to_cancel():
            training = client.training.cancel(training_id)
            print(f"training {named} is {state_name(training.state)}", file=sys.stderr)
        else:
            print(f"training {named} {_goes_on(server, training_id)}", file=sys.stderr)
        return INTERRUPTED
    except ServerError as error:
        if error.code is not grpc.StatusCode.UNAVAILABLE:
            raise
        raise ServerError(error.code, f"{error}; it {_goes_on(server, training_id)}") from error


def _goes_on(server: str, training_id: str) -> str:
    watch = command_line("watch", server, training_id)
    cancel = command_line("cancel", server, training_id)
    return f"goes on without being watched; watch it: {watch}; cancel it: {cancel}"


def _wants_to_cancel() -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        print("\ncancel the training? It goes on otherwise. [y/N] ", end="", file=sys.stderr)
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def _show(client: Client, training_id: str, previews: Path | None) -> training_pb2.Training:
    """The training when it has ended."""
    training = training_pb2.Training()
    told = 0  # of the images that are skipped
    bar: tqdm[Any] = tqdm(unit="step", leave=False, disable=not sys.stderr.isatty())
    with bar:
        for response in client.training.watch(training_id):
            training = response.training
            for skipped in training.skipped_images[told:]:
                name, reason = printable(skipped.file_name), printable(skipped.reason)
                tqdm.write(f"  not learned from: {name}: {reason}", file=sys.stderr)
            told = len(training.skipped_images)
            _advance(bar, training)
            if response.preview and previews is not None:
                path = previews / f"step-{response.preview_step:05d}.png"
                write_atomically(path, response.preview)
    return training


def _advance(bar: "tqdm[Any]", training: training_pb2.Training) -> None:
    progress, state = training.progress, state_name(training.state)
    ahead = f", {training.queue_position} ahead" if training.queue_position else ""
    bar.set_description_str(f"{state}{ahead}", refresh=False)
    if training.HasField("progress"):
        loss = {"loss": f"{progress.loss:.4f}"} if progress.HasField("loss") else {}
        bar.set_postfix(loss, best=f"{progress.best_evaluation_loss:.4f}", refresh=False)
        bar.total = progress.steps
        bar.n = progress.step  # an attempt that begins anew goes back
    bar.refresh()


def _conclude(client: Client, server: str, training: training_pb2.Training) -> int:
    training_id = training.training_id
    if training.state == training_pb2.TRAINING_STATE_SUCCEEDED:
        _tell_success(server, training)
        return 0
    if training.state != training_pb2.TRAINING_STATE_FAILED:
        raise TrainingEndedBadly(f"training {training_id} is {state_name(training.state)}")
    remedy = ""
    if client.training.get(training_id).concept_file:
        export = command_line("export", server, training_id, "--output", "FILE")
        remedy = f"; what was learned is there: {export}"
    raise TrainingEndedBadly(f"training {training_id} has failed: {training.error}{remedy}")


def _tell_success(server: str, training: training_pb2.Training) -> None:
    token, progress = training.spec.placeholder_token, training.progress
    if progress.best_step == 0:
        print(
            "nothing was learned: no evaluation was better than the one before the first step; "
            "lower --learning-rate or give more --steps",
            file=sys.stderr,
        )
    print(
        f"evaluation loss {progress.initial_evaluation_loss:.4f} -> "
        f"{progress.best_evaluation_loss:.4f} (step {progress.best_step} of {progress.step}); "
        f"the server has {printable(token)} as concept {printable(training.concept_id[:12])}"
    )
    draw = ["oneword", "generate", f"a photo of {token}", "--server", server]
    export = ["oneword", "concepts", "export", token, "--server", server]
    name = "".join(character for character in token if character.isalnum()) or "word"
    print(f"draw with it: {printable(shlex.join(draw))}")
    print(f"fetch it: {printable(shlex.join([*export, '--output', f'{name}.safetensors']))}")
