"""One word of a command: what happens to the states of its run, and the files that are left."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn

from tqdm import tqdm

from engine.concepts import MAX_NUM_VECTORS, Concept, write_concept
from engine.files import write_atomically
from engine.printing import printable
from trainer.checkpoints import RunIdentity, write_checkpoint
from trainer.course import MAX_POINTS, CoursePoint
from trainer.course_judge import CourseJudge, JudgedCourse, judge_course
from trainer.disk import Need, PatientWrites, write_somewhere
from trainer.errors import LearningError
from trainer.image_tower import ImageTower
from trainer.images import TrainingImages
from trainer.learn_reports import report_rollback, report_start, warn_nothing_learned
from trainer.learn_tasks import LearnTask
from trainer.model import DiffusionModel
from trainer.options import LearnOptions
from trainer.provenance import concept_metadata
from trainer.run import LearnState
from trainer.sampling import image_size, png_bytes, sample_images, side_by_side
from trainer.scalars import EventLog, scalars_of
from trainer.splicing import as_concept
from trainer.tradeoff import Preference

_STATE_TENSORS = 8  # of a checkpoint, each the size of the vectors, beside its course
# Of what files say of a run: options and names, the digest of each image, each evaluation's loss.
_TEXT_BYTES, _IMAGE_BYTES, _LOSS_BYTES = 8 << 10, 80, 160


@dataclass(slots=True, kw_only=True)
class LearnWord:
    """One word: what is learned of which images, and the last state of its run."""

    task: LearnTask
    model: DiffusionModel
    options: LearnOptions
    images: TrainingImages
    towers: Sequence[ImageTower]
    identity: RunIdentity
    checkpoint_every: int
    preview_every: int | None
    judge: CourseJudge | None
    state: LearnState | None  # None before the first, unless the run goes on
    goes_on: bool  # whether earlier files are this run's own
    label: str = ""  # before what is said of it, where there are others
    scalars: EventLog | None = None
    judged: JudgedCourse | None = None
    writes: PatientWrites = field(default_factory=PatientWrites)

    def needs(self) -> list[Need]:
        """The room that its files take at most, the old and the new checkpoint at once."""
        # More than a concept can hold are refused later, in words of their own.
        vectors = 4 * min(self.options.num_vectors, MAX_NUM_VECTORS) * sum(self.model.dims)
        evaluations = 2 + self.options.steps // self.options.eval_every
        points = min(evaluations, MAX_POINTS)
        texts = _TEXT_BYTES + _IMAGE_BYTES * len(self.images.names)
        checkpoint = (_STATE_TENSORS + points) * vectors + texts + _LOSS_BYTES * evaluations
        concept = vectors + texts + _LOSS_BYTES * points
        folder, kept = self.task.output.parent, self.task.kept
        needs = [
            Need(what="two checkpoints", folder=folder, num_bytes=2 * checkpoint),
            Need(what="concept", folder=folder, num_bytes=concept),
        ]
        if kept:
            what = "concepts of the course"
            needs.append(Need(what=what, folder=kept, num_bytes=points * concept))
        return needs

    def open_scalars(self) -> None:
        """Begin, or go on with, what TensorBoard shows; a run that goes on is cut at its state."""
        if self.task.scalars:
            before_all = -1 if self.goes_on else None
            step = before_all if self.state is None else self.state.step
            self.scalars = EventLog.open(self.task.scalars, resume_from=step)

    def attend(self, state: LearnState, bar: "tqdm[NoReturn]") -> None:
        """What happens to a state: progress bar, preview, numbers, checkpoint."""
        if state is self.state:
            return  # a finished word waits for the others, or one that goes on has not yet
        self.state = state
        bar.update(state.step - bar.n)
        if state.rolled_back:
            report_rollback(state, self.label)
            self.writes.attempt(f"numbers in {self.task.scalars}", self.open_scalars)
        elif state.step == 0:
            report_start(state, self.label)
        # Before step 1 there is none, nor where the run was rolled back.
        loss = {} if math.isnan(state.loss) else {"loss": f"{state.loss:.4f}"}
        bar.set_postfix(loss, best=f"{state.best_evaluation_loss:.4f}")
        self._note(state, self._preview(state))
        if state.step and state.step % self.checkpoint_every == 0:
            self._write_checkpoint(state)

    def _write_checkpoint(self, state: LearnState) -> None:
        write = partial(write_checkpoint, self.task.checkpoint, state, self.identity)
        self.writes.attempt(f"the checkpoint {self.task.checkpoint}", write)

    def _preview(self, state: LearnState) -> dict[str, bytes]:
        """Draw and write a preview if it is due; for TensorBoard by its tag."""
        if not self.preview_every or state.step % self.preview_every:
            return {}
        token = self.task.placeholder_token
        concept = as_concept(self.model, state.word_vectors, placeholder_token=token)
        prompts = [f"a photo of {token}"] * 4
        drawn = sample_images(self.model, [concept], prompts, size=image_size(self.model))
        png = png_bytes(side_by_side(drawn))
        path = self.task.preview(state.step)
        self.writes.attempt(f"previews in {path.parent}", partial(write_atomically, path, png))
        return {"preview": png}

    def _note(self, state: LearnState, pictures: Mapping[str, bytes]) -> None:
        if self.scalars is None or state.rolled_back:
            return
        numbers = scalars_of(state, self.options, self.model.dims)
        self.scalars.add(state.step, numbers, pictures)
        self.writes.attempt(f"numbers in {self.task.scalars}", self.scalars.flush)

    def saved(self) -> str:
        """Write a checkpoint, if need be elsewhere; in words when it was and where it is."""
        if (state := self.state) is None:
            return f"{self.label}before the first step; nothing to save"
        after = f"{self.label}after step {state.step}; "
        write = partial(write_checkpoint, state=state, identity=self.identity)
        try:
            path, error = write_somewhere(self.task.checkpoint, write)
        except OSError as error:
            return f"{after}nothing could be saved: {error}"
        if error is None:
            return f"{after}state and best vectors are in {path}"
        return (
            f"{after}{self.task.checkpoint} cannot be written ({error.strerror}): state and best "
            f"vectors are in {path}; move it there when there is room"
        )

    def judge_course(self, prefer: Preference) -> None:
        """Draw and measure the points of the course, which takes a while."""
        assert self.judge and self.state
        self._write_checkpoint(self.state)  # a kill while judging must not cost the learning
        course = self.state.course
        label = f"judging {self.task.placeholder_token}"
        with tqdm(total=len(course), desc=label, unit="point", leave=False) as bar:
            self.judged = judge_course(
                self.judge, self.model, course, self._concept_at, prefer, bar.update
            )

    def finish(self, *, seconds: float) -> str:
        """Write the concept, and on request those of the course; says what came out.

        Raises `LearningError` if a file could not be written; it says where the vectors are.
        """
        state = self.state
        if state is None:
            raise LearningError("the run yielded no state")
        chosen = self._chosen(state)
        if chosen.step == 0:
            warn_nothing_learned(self.task.placeholder_token)
        concept = self._concept_at(chosen)
        about_choice = self.judged.metadata() if self.judged else {}
        self._write(replace(concept, metadata={**concept.metadata, **about_choice}))
        if self.task.kept:
            self._keep_course(state)
        table = f"\n{self.judged.table()}\n" if self.judged else ""
        return (
            f"{self.label}{table}evaluation loss {state.initial_evaluation_loss:.4f} -> "
            f"{chosen.evaluation_loss:.4f} (step {chosen.step} of {state.step}), "
            f"{seconds:.0f} s; wrote {printable(self.task.output)}"
        )

    def _chosen(self, state: LearnState) -> CoursePoint:
        if self.judged:
            return self.judged.chosen
        return CoursePoint(
            step=state.best_step,
            evaluation_loss=state.best_evaluation_loss,
            vectors=state.best_vectors,
        )

    def _concept_at(self, point: CoursePoint) -> Concept:
        """The concept that a point of the course would be."""
        assert self.state
        metadata = {
            **concept_metadata(self.state, self.options, self.images, self.model, self.towers),
            "best_step": str(point.step),
            "final_evaluation_loss": f"{point.evaluation_loss:.6f}",
        }
        return as_concept(
            self.model,
            point.vectors,
            placeholder_token=self.task.placeholder_token,
            metadata=metadata,
        )

    def _write(self, concept: Concept) -> None:
        try:
            path, error = write_somewhere(self.task.output, partial(write_concept, concept))
        except OSError as nowhere:
            raise LearningError(
                f"{self.label}cannot write {self.task.output}: {nowhere.strerror}, nor anything "
                f"elsewhere{self._way_back()}"
            ) from nowhere
        if error is not None:
            raise LearningError(
                f"{self.label}cannot write {self.task.output}: {error.strerror}; the concept is in "
                f"{path} instead: move it where you want it{self._way_back()}"
            ) from error

    def _way_back(self) -> str:
        if not self.task.checkpoint.exists():
            return ""
        return (
            f"; {self.task.checkpoint} is still there: with room on the disk, the same command "
            "with --resume goes on from it"
        )

    def _keep_course(self, state: LearnState) -> None:
        try:
            for point in state.course:
                write_concept(self._concept_at(point), self.task.kept_concept(point.step))
        except OSError as error:
            raise LearningError(
                f"{self.label}the concept is in {self.task.output}, but those of its course cannot "
                f"be written: {error}; {self.saved()}; make room, and --resume writes them"
            ) from error
