"""`oneword learn --together`: several words in one run, with images that show all of them."""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from engine.concepts import write_concept
from engine.files import write_atomically
from engine.printing import printable
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.disk import Need, PatientWrites, check_room, write_somewhere
from trainer.errors import CheckpointError, Diverged, LearningError, NoGradient
from trainer.images import TrainingImages, read_images
from trainer.joint import (
    JointWord,
    check_for_all,
    joint_concepts,
    joint_identity,
    learn_jointly,
    sentences_for,
)
from trainer.learn_reports import report_images, report_rollback, warn_nothing_learned
from trainer.learn_tasks import LearnTask
from trainer.model import DiffusionModel
from trainer.options import LearnOptions
from trainer.presets import check_captions
from trainer.run import LearnState
from trainer.sampling import image_size, png_bytes, sample_images, side_by_side
from trainer.terminal import Terminated

# What the command has for words alone: each of it would need an answer to "which word's?".
_ALONE = ("prefer", "encoder", "keep_checkpoints", "tensorboard", "image_tower")
_RUN_BYTES = 1 << 20  # a checkpoint or concept is some kilobytes


def add_joint_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument(
        "--together", type=Path, metavar="FOLDER",
        help="images that show all words of --concept at once: they are learned in one run, with "
        "each other",
    )  # fmt: skip
    parser.add_argument(
        "--sentence", action="append", default=[], metavar="TEXT",
        help="what the images of --together show, with the words as {0}, {1}, ... in the order of "
        "--concept, as in 'a photo of {0} beside {1}'; can be repeated (the words joined by 'and')",
    )  # fmt: skip


def check_joint(arguments: argparse.Namespace) -> bool:
    """Whether a joint run is asked for; raises `LearningError` for what does not go with it."""
    if not arguments.together:
        if arguments.sentence:
            raise LearningError("--sentence describes the images of --together; name their folder")
        return False
    if not arguments.concept:
        raise LearningError(
            "--together is for several words: name each with --concept '<cat>=FOLDER'"
        )
    for name in _ALONE:
        if getattr(arguments, name):
            raise LearningError(
                f"--{name.replace('_', '-')} is for words that are learned alone; leave it out of "
                "a run with --together"
            )
    return True


@dataclass(slots=True, kw_only=True)
class JointJob:
    """One joint run of the command: everything around the loop."""

    model: DiffusionModel
    options: LearnOptions  # without what belongs to each word
    tasks: Sequence[LearnTask]
    words: Sequence[JointWord]
    together: TrainingImages
    sentences: Sequence[str]
    checkpoint: Path
    identity: RunIdentity
    checkpoint_every: int
    preview_every: int | None
    max_rows: int  # of a pass of the denoiser
    state: LearnState | None = None
    writes: PatientWrites = field(default_factory=PatientWrites)

    @classmethod
    def prepare(
        cls,
        model: DiffusionModel,
        tasks: Sequence[LearnTask],
        options: LearnOptions,
        arguments: argparse.Namespace,
    ) -> "JointJob":
        """Read images and checkpoint; whatever can be refused before learning, is."""
        checkpoint = arguments.output / "together.checkpoint"
        if checkpoint.exists() and not arguments.resume:
            raise CheckpointError(
                f"{checkpoint} holds an unfinished run; add --resume to go on with it, or delete it"
            )
        check_for_all(options)
        size = image_size(model)
        words = [
            JointWord(
                placeholder_token=task.placeholder_token,
                images=_read(task.images, task.placeholder_token, size, arguments.presets),
                num_vectors=options.num_vectors,
                initializer_token=options.initializer_token,
                learnable_property=options.learnable_property,
            )
            for task in tasks
        ]
        together = _read(arguments.together, None, size)
        shared = dataclasses.replace(
            options, num_vectors=1, initializer_token=None, learnable_property="object"
        )
        sentences = tuple(arguments.sentence) or sentences_for(len(words))
        identity = joint_identity(model, words, together, shared, sentences)
        check_room([Need(what="run", folder=arguments.output, num_bytes=_RUN_BYTES)])
        return cls(
            model=model,
            options=shared,
            tasks=tasks,
            words=words,
            together=together,
            sentences=sentences,
            checkpoint=checkpoint,
            identity=identity,
            checkpoint_every=arguments.checkpoint_every,
            preview_every=arguments.preview_every,
            max_rows=arguments.max_rows,
            state=read_checkpoint(checkpoint, identity) if arguments.resume else None,
        )

    def learn(self) -> None:
        """Run the loop to its end; whatever ends it early leaves a checkpoint."""
        try:
            self._loop()
        except KeyboardInterrupt as interrupt:
            why = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
            print(f"{why} {self._saved()}; the same command with --resume goes on", file=sys.stderr)
            raise
        except (Diverged, NoGradient) as error:
            raise type(error)(
                f"{error}; stopped {self._saved()}; delete {self.checkpoint} and start with a "
                "lower --learning-rate, since --resume would come to the same step"
            ) from error

    def _loop(self) -> None:
        begun = self.state.step if self.state else 0
        with tqdm(total=self.options.steps, initial=begun) as bar:
            for state in learn_jointly(
                self.model,
                self.words,
                self.together,
                self.options,
                sentences=self.sentences,
                resume_from=self.state,
                max_rows=self.max_rows,
            ):
                self.state = state
                bar.update(state.step - bar.n)
                if state.rolled_back:
                    report_rollback(state, "")
                loss = {} if math.isnan(state.loss) else {"loss": f"{state.loss:.4f}"}
                bar.set_postfix(loss, best=f"{state.best_evaluation_loss:.4f}")
                self._preview(state)
                if state.step and state.step % self.checkpoint_every == 0:
                    write = partial(write_checkpoint, self.checkpoint, state, self.identity)
                    self.writes.attempt(f"the checkpoint {self.checkpoint}", write)

    def _preview(self, state: LearnState) -> None:
        """Draw and write what the words are together, if that is due."""
        if not self.preview_every or state.step % self.preview_every or state.rolled_back:
            return
        names = [word.placeholder_token for word in self.words]
        prompts = [sentence.format(*names) for sentence in self.sentences[:4]]
        concepts = joint_concepts(self.model, self.words, self.options, state, latest=True)
        drawn = sample_images(self.model, concepts, prompts, size=image_size(self.model))
        path = self.checkpoint.with_name(f"together.step-{state.step:05d}.png")
        write = partial(write_atomically, path, png_bytes(side_by_side(drawn)))
        self.writes.attempt(f"previews in {path.parent}", write)

    def _saved(self) -> str:
        """Save what there is; in words when it was and where it is."""
        if (state := self.state) is None:
            return "before the first step; nothing to save"
        write = partial(write_checkpoint, state=state, identity=self.identity)
        try:
            path, error = write_somewhere(self.checkpoint, write)
        except OSError as error:
            return f"after step {state.step}; nothing could be saved: {error}"
        why = f" ({self.checkpoint} cannot be written: {error.strerror})" if error else ""
        return f"after step {state.step}; state and best vectors are in {path}{why}"

    def finish(self, *, started: float) -> None:
        """Write the concepts, say what came out, remove the checkpoint.

        Raises `LearningError` if a file could not be written, when all that could be are.
        """
        state = self.state
        assert state is not None
        if state.best_step == 0:
            warn_nothing_learned(" and ".join(task.placeholder_token for task in self.tasks))
        concepts = joint_concepts(self.model, self.words, self.options, state)
        problems: list[str] = []
        for task, concept in zip(self.tasks, concepts, strict=True):
            try:
                write_concept(concept, task.output)
            except OSError as error:
                problems.append(f"cannot write {task.output}: {error.strerror}")
        if problems:
            raise LearningError(f"{'; '.join(problems)}; stopped {self._saved()}; make room, and "
                                "--resume writes them")  # fmt: skip
        names = ", ".join(printable(task.output) for task in self.tasks)
        print(
            f"evaluation loss {state.initial_evaluation_loss:.4f} -> "
            f"{state.best_evaluation_loss:.4f} (step {state.best_step} of {state.step}), "
            f"{time.monotonic() - started:.0f} s; wrote {names}"
        )
        self.checkpoint.unlink(missing_ok=True)


def _read(
    folder: Path, placeholder_token: str | None, size: int, presets: Sequence[str] = ()
) -> TrainingImages:
    print(f"{placeholder_token or 'together'}: {printable(folder)}")
    images = read_images(folder, size=size, placeholder_token=placeholder_token)
    report_images(images, size)
    check_captions(presets, images.captioned)
    return images
