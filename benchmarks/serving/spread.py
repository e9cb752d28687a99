"""Many times in a few numbers, and the line through what should not grow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """Count, median, p10, p90, p99 and largest of some values."""
    if not values:
        return {"count": 0}
    p10, median, p90, p99 = (float(np.percentile(values, share)) for share in (10, 50, 90, 99))
    return {
        "count": len(values),
        "median": median,
        "p10": p10,
        "p90": p90,
        "p99": p99,
        "max": max(values),
    }


def reached(values: Sequence[float], total: int, share: float) -> float | None:
    """What this share of `total` has reached at most; None where fewer of them have a value."""
    rank = math.ceil(share * total)
    return sorted(values)[rank - 1] if rank <= len(values) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio, and where it lies in 95 of 100 measurements like this one."""

    ratio: float
    low: float
    high: float


def percentile_ratio(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    percent: float,
    *,
    block: int = 50,
    resamples: int = 2000,
) -> Ratio:
    """Our percentile in theirs; a row a run, the same requests in the same order in both.

    The interval is of a bootstrap of blocks (Kuensch, The jackknife and the bootstrap for general
    stationary observations, 1989): who waits, waits with its neighbours, so that stretches of
    `block` requests are drawn in place of single ones, the same for both.
    """
    pairs = [
        np.array([a[start : start + block], b[start : start + block]])
        for a, b in zip(ours, theirs, strict=True)
        for start in range(0, len(a), block)
    ]
    random = np.random.default_rng(0)
    drawn = [
        _ratio(np.concatenate([pairs[one] for one in chosen], axis=1), percent)
        for chosen in random.integers(0, len(pairs), (resamples, len(pairs)))
    ]
    low, high = np.percentile(drawn, (2.5, 97.5))
    whole = _ratio(np.concatenate(pairs, axis=1), percent)
    return Ratio(ratio=whole, low=float(low), high=float(high))


def _ratio(pair: np.ndarray, percent: float) -> float:
    ours, theirs = np.percentile(pair, percent, axis=1)
    return float(ours / theirs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The least-squares line through points."""

    slope: float
    intercept: float
    slope_error: float  # its standard error

    @property
    def is_flat(self) -> bool:
        """Whether a slope of zero is within two standard errors."""
        return abs(self.slope) <= 2.0 * self.slope_error


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Ordinary least squares; at least three points, not all at one x."""
    mean_x, mean_y = fmean(x), fmean(y)
    spread_x = sum((one - mean_x) ** 2 for one in x)
    if len(x) < 3 or not spread_x:
        raise ValueError(f"a line and its error need three points at several x, got {len(x)}")
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread_x
    intercept = mean_y - slope * mean_x
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return Line(
        slope=slope,
        intercept=intercept,
        slope_error=math.sqrt(residual / (len(x) - 2) / spread_x),
    )
