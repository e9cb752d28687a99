"""The job of `oneword learn`: the words that it was told to learn, from files to files."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tqdm import tqdm

from engine.printing import printable
from trainer.checkpoints import RunIdentity, read_checkpoint
from trainer.course_judge import CourseJudge
from trainer.disk import check_room
from trainer.encoders import Encoder
from trainer.errors import Diverged, LearningError, NoGradient
from trainer.evaluation_errors import EvaluationError
from trainer.fingerprint import model_fingerprint
from trainer.image_tower import ImageTower, open_image_towers
from trainer.images import read_images
from trainer.learn_reports import report_images
from trainer.learn_tasks import LearnTask
from trainer.learn_word import LearnWord
from trainer.learning import learn_together
from trainer.model import DiffusionModel
from trainer.options import LearnOptions
from trainer.presets import check_captions
from trainer.run import LearnState
from trainer.sampling import image_size
from trainer.terminal import Terminated
from trainer.tradeoff import Preference


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnJob:
    """One run of the command: everything around the loop."""

    model: DiffusionModel
    options: LearnOptions
    words: Sequence[LearnWord]
    towers: Sequence[ImageTower]
    prefer: Preference | None
    max_rows: int  # of a pass of the denoiser

    @classmethod
    def prepare(
        cls,
        model: DiffusionModel,
        tasks: Sequence[LearnTask],
        options: LearnOptions,
        arguments: argparse.Namespace,
        encoder: Encoder | None,
    ) -> "LearnJob":
        """Read images and checkpoints; whatever can be refused before learning, is."""
        towers = open_image_towers(arguments.image_tower, model)
        fingerprint = model_fingerprint(model)
        # Of several words, one that was killed before its first checkpoint starts anew.
        begun = [task for task in tasks if task.checkpoint.exists()] or tasks
        words = [
            _word(
                task,
                model,
                options,
                arguments,
                encoder,
                towers=towers,
                fingerprint=fingerprint,
                begun=task in begun,
            )
            for task in tasks
        ]
        check_room(need for word in words for need in word.needs())
        for word in words:
            word.open_scalars()
        return cls(
            model=model,
            options=options,
            words=words,
            towers=towers,
            prefer=arguments.prefer,
            max_rows=arguments.max_rows,
        )

    def learn(self) -> None:
        """Run the loop to its end; whatever ends it early leaves checkpoints."""
        try:
            self._loop()
            if self.prefer:
                for word in self.words:
                    word.judge_course(self.prefer)
        except KeyboardInterrupt as interrupt:
            why = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
            print(f"{why} {self._saved()}; the same command with --resume goes on", file=sys.stderr)
            raise
        except EvaluationError as error:
            raise type(error)(
                f"{error}; stopped {self._saved()}; without --prefer, --resume writes the concept"
            ) from error
        except (Diverged, NoGradient) as error:
            raise type(error)(f"{error}; stopped {self._saved()}; {self._advice()}") from error

    def _loop(self) -> None:
        given = [word.state for word in self.words]
        with ExitStack() as stack:
            bars = [
                stack.enter_context(
                    tqdm(
                        total=self.options.steps,
                        initial=state.step if state else 0,
                        desc=word.label.strip(": ") or None,
                        position=place,
                    )
                )
                for place, (word, state) in enumerate(zip(self.words, given, strict=True))
            ]
            for states in self._states(given):
                for word, state, bar in zip(self.words, states, bars, strict=True):
                    word.attend(state, bar)

    def _states(self, given: Sequence[LearnState | None]) -> Iterator[tuple[LearnState, ...]]:
        return learn_together(
            self.model,
            [word.images for word in self.words],
            [self.options] * len(self.words),
            towers=self.towers,
            resume_from=given,
            max_rows=self.max_rows,
        )

    def _saved(self) -> str:
        """Save what there is of each word; says when it was and where it is."""
        return "; ".join(word.saved() for word in self.words)

    def _advice(self) -> str:
        """Not --resume: the same step would fail again, and other settings are another run."""
        if len(self.words) > 1:
            return "without that --concept, the others go on with --resume"
        return (
            f"delete {self.words[0].task.checkpoint} and start with a lower --learning-rate, since "
            "--resume would come to the same step"
        )

    def finish(self, *, started: float) -> None:
        """Write the concepts, say what came out, remove the checkpoints.

        Raises `LearningError` if a file could not be written, when all that could be are.
        """
        problems: list[str] = []
        for word in self.words:
            try:
                print(word.finish(seconds=time.monotonic() - started))
            except LearningError as error:
                problems.append(str(error))
        if problems:
            raise LearningError("; ".join(problems))
        for word in self.words:
            word.task.checkpoint.unlink(missing_ok=True)


def _word(
    task: LearnTask,
    model: DiffusionModel,
    options: LearnOptions,
    arguments: argparse.Namespace,
    encoder: Encoder | None,
    *,
    towers: Sequence[ImageTower],
    fingerprint: str,
    begun: bool,
) -> LearnWord:
    """A word with its images read, and if its run goes on with its state."""
    token, size = task.placeholder_token, image_size(model)
    if arguments.concept:
        print(f"{token}: {printable(task.images)}")
    images = read_images(task.images, size=size, placeholder_token=token)
    report_images(images, size)
    check_captions(arguments.presets, images.captioned)
    identity = RunIdentity.of(
        model, images, options, placeholder_token=token, towers=towers, fingerprint=fingerprint
    )
    judge = CourseJudge.of(encoder, images, options.learnable_property) if encoder else None
    resumes = arguments.resume and begun
    return LearnWord(
        task=task,
        model=model,
        options=options,
        images=images,
        towers=towers,
        identity=identity,
        checkpoint_every=arguments.checkpoint_every,
        preview_every=arguments.preview_every,
        judge=judge,
        state=read_checkpoint(task.checkpoint, identity) if resumes else None,
        goes_on=arguments.resume,
        label=f"{token}: " if arguments.concept else "",
    )
