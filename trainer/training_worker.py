"""A learning process of the server: one training, from its folder to a concept in it.

`python -m trainer.training_worker FOLDER --model DIR` reads the spec and the images of an
`engine.training.folder.TrainingFolder`, reports on standard output, keeps a checkpoint and goes on
from it, and ends with 0 when the concept is written. SIGTERM, and the end of standard input (the
server is gone), make it save and end with 143.
"""

import argparse
import contextlib
import fcntl
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

import torch

from engine.concepts import write_concept
from engine.errors import OneWordError
from engine.files import is_full, write_atomically
from engine.training.folder import TrainingFolder, TrainingRecord
from engine.training.reports import (
    MAX_REASON_CHARACTERS,
    Failure,
    Progress,
    Report,
    Skipped,
    to_line,
)
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.errors import CheckpointError, LearningError, NoUsableImages
from trainer.images import TrainingImages, read_images
from trainer.learning import learn
from trainer.messages import first_line
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions
from trainer.placement import place
from trainer.precision import unet_dtype
from trainer.provenance import concept_metadata
from trainer.quiet import quiet_libraries
from trainer.run import LearnState
from trainer.sampling import image_size, png_bytes, sample_images
from trainer.splicing import as_concept
from trainer.terminal import Terminated, sigterm_raises

_FAILED = 1
_TERMINATED = 143  # the shell's exit code for SIGTERM
_NICENESS = 10  # the server's own images go first
_LOCK_TIMEOUT_S = 60.0  # for the process of a server that was killed, which is still saving


def main(argv: Sequence[str] | None = None) -> int:
    """Learn; returns the exit code."""
    arguments = _parser().parse_args(argv)
    reporter = Reporter.on_stdout()
    try:
        with sigterm_raises():
            _end_with_stdin()
            os.nice(_NICENESS)
            quiet_libraries()
            os.chdir(arguments.folder)  # so that no message tells where the server keeps things
            folder = TrainingFolder(Path())
            with _locked(folder):
                Run.prepare(folder, arguments, reporter).learn()
    except KeyboardInterrupt as interrupt:
        return _TERMINATED if isinstance(interrupt, Terminated) else _FAILED
    except Exception as error:
        traceback.print_exc()  # into the log of the training
        reporter.send(failure_of(error, arguments.model))
        return _FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Learn the word of one training of a server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="PyTorch device (%(default)s)")
    parser.add_argument("--checkpoint-every-s", type=float, default=5.0)
    return parser


def failure_of(error: Exception, model: Path) -> Failure:
    """What the caller is told of an error: its own words only where they are written for people."""
    match error:
        case OneWordError():
            reason = first_line(error).replace(str(model), "the training model")
            # A device that is full has no room now: what fills it may be gone soon.
            retryable = isinstance(error.__cause__, torch.OutOfMemoryError)
        case OSError() if is_full(error):
            reason, retryable = "the disk of the trainings is full", True
        case MemoryError() | torch.OutOfMemoryError():
            reason, retryable = "out of memory; ask for a smaller batch_size", True
        case _:
            reason = "internal error; worker.log in the folder of the training has it"
            retryable = True
    return Failure(reason=reason[:MAX_REASON_CHARACTERS], retryable=retryable)


@dataclass(frozen=True, slots=True)
class Reporter:
    """The way of reports to the server."""

    stream: BinaryIO

    @classmethod
    def on_stdout(cls) -> Self:
        """Take standard output for reports alone; what anything else prints goes to the log."""
        stream = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        return cls(stream)

    def send(self, report: Report) -> None:
        with contextlib.suppress(BrokenPipeError):  # the server is gone, and SIGTERM under way
            self.stream.write(to_line(report))


def _end_with_stdin() -> None:
    """Send this process SIGTERM when standard input ends: its other end is the server's."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _locked(folder: TrainingFolder) -> Generator[None]:
    """Be the only process of a training."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with folder.lock.open("wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield


@dataclass(kw_only=True)
class Run:
    """Everything around the loop of one training."""

    folder: TrainingFolder
    record: TrainingRecord
    reporter: Reporter
    options: LearnOptions
    model: DiffusionModel
    images: TrainingImages
    identity: RunIdentity
    checkpoint_every_s: float
    _saved_at: float = field(default_factory=time.monotonic)
    _preview_step: int = 0

    @classmethod
    def prepare(
        cls, folder: TrainingFolder, arguments: argparse.Namespace, reporter: Reporter
    ) -> Self:
        record = folder.read_record()
        token = record.spec.placeholder_token
        options = LearnOptions(**record.spec.options)
        dtype = unet_dtype("auto", arguments.device)
        model = place(load_model(arguments.model, unet_dtype=dtype), arguments.device)
        try:
            images = read_images(folder.images, size=image_size(model), placeholder_token=token)
        except NoUsableImages as error:
            raise NoUsableImages(with_file_names(str(error), record)) from error
        return cls(
            folder=folder,
            record=record,
            reporter=reporter,
            options=options,
            model=model,
            images=images,
            identity=RunIdentity.of(model, images, options, placeholder_token=token),
            checkpoint_every_s=arguments.checkpoint_every_s,
        )

    def learn(self) -> None:
        """Go on from the checkpoint, if there is one, to the concept."""
        self._report_skipped()
        state = resumed = self._resumed()
        if resumed is not None:
            self._report(resumed)
        try:
            for state in learn(self.model, self.images, self.options, resume_from=resumed):
                self._attend(state)
        except KeyboardInterrupt:
            if state is not None:
                write_checkpoint(self.folder.checkpoint, state, self.identity)
            raise
        if state is None:
            raise LearningError("the run yielded no state")
        metadata = concept_metadata(state, self.options, self.images, self.model)
        concept = as_concept(
            self.model,
            state.best_vectors,
            placeholder_token=self.record.spec.placeholder_token,
            metadata=metadata,
        )
        write_concept(concept, self.folder.concept)

    def _resumed(self) -> LearnState | None:
        """The state to go on from; a checkpoint of another model or version is of no use."""
        if not self.folder.checkpoint.exists():
            return None
        try:
            return read_checkpoint(self.folder.checkpoint, self.identity)
        except CheckpointError as error:
            print(f"starting anew: {error}", file=sys.stderr)
            return None

    def _attend(self, state: LearnState) -> None:
        """What happens to a state: checkpoint, preview, report."""
        if state.step and time.monotonic() - self._saved_at >= self.checkpoint_every_s:
            write_checkpoint(self.folder.checkpoint, state, self.identity)
            self._saved_at = time.monotonic()
        every = self.record.spec.preview_every_steps
        if every and state.step and state.step % every == 0:
            self._draw_preview(state)
        self._report(state)

    def _draw_preview(self, state: LearnState) -> None:
        token = self.record.spec.placeholder_token
        concept = as_concept(self.model, state.word_vectors, placeholder_token=token)
        size = image_size(self.model)
        (image,) = sample_images(self.model, [concept], [f"a photo of {token}"], size=size)
        write_atomically(self.folder.preview, png_bytes(image))
        self._preview_step = state.step

    def _report(self, state: LearnState) -> None:
        self.reporter.send(
            Progress(
                step=state.step,
                steps=self.options.steps,
                loss=state.loss if math.isfinite(state.loss) else None,
                initial_evaluation_loss=state.initial_evaluation_loss,
                best_evaluation_loss=state.best_evaluation_loss,
                best_step=state.best_step,
                preview_step=self._preview_step,
            )
        )

    def _report_skipped(self) -> None:
        """Say which images are of no use, by their index."""
        for file in self.images.skipped:
            index, _, _ = file.name.partition("-")
            reason = with_file_names(file.reason, self.record)[:MAX_REASON_CHARACTERS]
            self.reporter.send(Skipped(index=int(index), reason=reason))


def with_file_names(text: str, record: TrainingRecord) -> str:
    """A message about stored images with the names that the caller gave them.

    Masks and captions have none of their own: "its mask" says enough.
    """
    for index, image in enumerate(record.images):
        name = TrainingFolder.image_name(index, image.sha256)
        text = text.replace(f" {name}.mask.png", "").replace(f" {name}.txt", "")
        text = text.replace(name, image.file_name)
    return text


if __name__ == "__main__":
    exit_code = main()
    sys.stderr.flush()
    # All is saved by now, and the orderly end of PyTorch can take as long as its beginning.
    os._exit(exit_code)
