"""Guidance in a part of the schedule only: where it hardly matters, its rows are not computed.

Kynkäänniemi et al. 2024, arXiv 2404.07724, guide in an interval of noise levels; here it is one of
the denoiser calls of an image, because a call has the rows that it is given and costs by them.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GuidedCalls:
    """Which denoiser calls of an image have all of its rows; the others have the prompt's alone."""

    first: int
    end: int  # the first call behind them

    @classmethod
    def between(cls, start: float, end: float, num_calls: int) -> "GuidedCalls":
        """Those whose middle, (i + 0.5) / num_calls, lies in [start, end)."""
        return cls(_calls_before(start, num_calls), _calls_before(end, num_calls))

    def __contains__(self, call: int) -> bool:
        return self.first <= call < self.end

    def num_left(self, steps_done: int) -> int:
        """How many of them are still to come when so many calls are done."""
        return max(self.end - max(self.first, steps_done), 0)

    def num_alike(self, steps_done: int, num_calls: int) -> int:
        """How many calls, from the next one to the last of `num_calls`, have the same rows."""
        ends = [end for end in (self.first, self.end, num_calls) if end > steps_done]
        return min(ends, default=steps_done) - steps_done


def _calls_before(position: float, num_calls: int) -> int:
    return min(max(math.ceil(position * num_calls - 0.5), 0), num_calls)
