"""The course of a run: its vectors at each evaluation, from before the first step on.

One evaluation loss is not all that matters of a word, so the course is kept, in checkpoints too:
what is most faithful and what is most editable is among its points (trainer/course_judge.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

MAX_POINTS = 128  # even, so that thinning keeps the newest point as well as the first
_PREFIX = "course."


@dataclass(frozen=True, slots=True, kw_only=True)
class CoursePoint:
    """An evaluated state, as far as it can become a concept."""

    step: int
    evaluation_loss: float
    vectors: Float32[Tensor, "num_vectors dim"]


Course = tuple[CoursePoint, ...]


def extended(course: Course, point: CoursePoint) -> Course:
    """The course with one point more; of more than `MAX_POINTS` every second is left out."""
    longer = (*course, point)
    return longer if len(longer) <= MAX_POINTS else longer[::2]


def course_tensors(course: Course) -> dict[str, Tensor]:
    """The vectors of each point by the name that they have in a checkpoint."""
    return {f"{_PREFIX}{point.step}": point.vectors.clone() for point in course}


def course_steps(course: Course) -> list[tuple[int, float]]:
    """Step and evaluation loss of each point, which `course_from_tensors` wants beside them."""
    return [(point.step, point.evaluation_loss) for point in course]


def course_from_tensors(tensors: dict[str, Tensor], steps: Sequence[tuple[int, float]]) -> Course:
    """The course of a checkpoint; takes its tensors out of `tensors`.

    Raises `ValueError` or `KeyError` where they are not what `course_tensors` makes.
    """
    course = tuple(
        CoursePoint(
            step=int(step),
            evaluation_loss=float(loss),
            vectors=_checked(tensors.pop(f"{_PREFIX}{step}"), step),
        )
        for step, loss in steps
    )
    if not course:
        raise ValueError("it holds no course")
    return course


def _checked(vectors: Tensor, step: int) -> Tensor:
    if vectors.dtype != torch.float32 or vectors.ndim != 2:
        raise ValueError(f"{_PREFIX}{step} is {vectors.dtype} {tuple(vectors.shape)}")
    return vectors
