"""Likeness against editability: points of the paper's figure, the best of them, and a choice.

What lies on the Pareto front is beaten by no other point in both measures. Where on the front to
stop is a matter of use, not of measuring: `choose` takes a preference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.evaluation_errors import EvaluationError

Preference = Literal["faithful", "editable"]
PREFERENCES: tuple[Preference, ...] = ("faithful", "editable")
# What is preferred counts twice. Its extreme alone would not do: the most editable checkpoint of a
# run is its first, which has learned nothing.
_PREFERRED, _OTHER = 2.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOffPoint:
    """A concept, a variant or a checkpoint, by the two measures of the figure."""

    label: str
    image_similarity: float
    text_similarity: float

    def __post_init__(self) -> None:
        for name in ("image_similarity", "text_similarity"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise EvaluationError(f"{name} of {self.label!r} is {value}; leave the point out")

    def dominates(self, other: "TradeOffPoint") -> bool:
        """At least as good in both measures, and better in one."""
        mine = (self.image_similarity, self.text_similarity)
        theirs = (other.image_similarity, other.text_similarity)
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def pareto_front(points: Sequence[TradeOffPoint]) -> tuple[TradeOffPoint, ...]:
    """The points that no other dominates, the most faithful first; of equal ones, each."""
    front = [point for point in points if not any(other.dominates(point) for other in points)]
    return tuple(sorted(front, key=lambda point: (-point.image_similarity, -point.text_similarity)))


def choose(points: Sequence[TradeOffPoint], prefer: Preference) -> TradeOffPoint:
    """The point of the front that suits a preference; of equally good ones the first given.

    Both measures are scaled to 0..1 over the front; then the preferred one counts twice. So a
    point wins over the most faithful one if it gains more than twice as much text similarity as it
    loses of image similarity, in shares of what the front offers.
    Raises `EvaluationError` where there is no point, or no such preference.
    """
    if prefer not in PREFERENCES:
        raise EvaluationError(
            f"cannot prefer {prefer!r}; choose {' or '.join(map(repr, PREFERENCES))}"
        )
    if not points:
        raise EvaluationError("there is no point to choose; evaluate at least one")
    front = pareto_front(points)
    candidates = [point for point in points if point in front]
    image = _scaled([point.image_similarity for point in candidates])
    text = _scaled([point.text_similarity for point in candidates])
    image_weight, text_weight = (
        (_PREFERRED, _OTHER) if prefer == "faithful" else (_OTHER, _PREFERRED)
    )
    marks = [image_weight * i + text_weight * t for i, t in zip(image, text, strict=True)]
    return candidates[marks.index(max(marks))]


def _scaled(values: Sequence[float]) -> list[float]:
    lowest, highest = min(values), max(values)
    if lowest == highest:
        return [0.0] * len(values)
    return [(value - lowest) / (highest - lowest) for value in values]
