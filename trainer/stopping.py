"""When to stop: DVAR (Voronov et al. 2023, arXiv 2302.04841)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import LearningError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeterministicVariance:
    """Stops when the evaluation loss has settled: the variance of its last `window` values is
    below `threshold` times the variance of all of them (arXiv 2302.04841, section 4.2).

    The evaluation batch is fixed, so all that its loss shows is what the vectors do. It counts
    evaluations, not steps.
    """

    window: int
    threshold: float = 0.15

    def __post_init__(self) -> None:
        if self.window < 2:
            raise LearningError(f"the window must hold at least 2 evaluations, got {self.window}")
        if not 0.0 < self.threshold < 1.0:
            raise LearningError(f"the threshold must be above 0 and below 1, got {self.threshold}")

    def settled(self, losses: Sequence[float]) -> bool:
        """Whether a run with these evaluation losses, from before its first step on, may stop."""
        if len(losses) <= self.window:
            return False
        whole = statistics.pvariance(losses)
        return statistics.pvariance(losses[-self.window :]) < self.threshold * whole
