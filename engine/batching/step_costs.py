"""What model calls take on this device: milliseconds by area of an image and by rows of a call.

Measured at start-up (`cost_measurement`) or given; learned from every call after that, so that it
follows the device. Areas are pixels of one image. Where nothing is known the answer is None, and
whoever asks must not refuse anything for it.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from statistics import median_low

_REMEMBERED = 5  # times of a cell; their median stands for it
_TRUSTED = 3  # times before a cell is believed: one call that was held up is not a cost
# Per pixel, row and step while nothing is known. Only sums of it are used, to share fairly; far
# below any device, so that what was queued then counts for little when real costs are known.
_GUESS_US = 1e-6

Curve = tuple[tuple[int, float], ...]  # (count, ms per pixel of the area), counts rising


class CallCosts:
    """One kind of call: its time by area bucket and by count (rows, or images).

    Read by any thread, written by one. Areas share a bucket within half an octave and times are
    kept per pixel, so there are few cells whatever sizes callers ask for, and a bucket never seen
    takes the curve of its nearest neighbour.
    """

    def __init__(self, *, flat_beyond: bool) -> None:
        """`flat_beyond`: with a single count known, larger calls are taken to cost the same, so
        that they are tried; otherwise to cost in proportion."""
        self._flat_beyond = flat_beyond
        self._times: dict[tuple[int, int], deque[float]] = {}
        self._curves: dict[int, Curve] = {}

    def set(self, area: int, count: int, ms: float) -> None:
        """Take `ms` as known, until later calls outvote it."""
        times = [ms / area] * _REMEMBERED
        self._times[_bucket(area), count] = deque(times, maxlen=_REMEMBERED)
        self._publish(_bucket(area))

    def observe(self, area: int, count: int, ms: float) -> None:
        """Learn from one call."""
        key = (_bucket(area), count)
        times = self._times.setdefault(key, deque(maxlen=_REMEMBERED))
        times.append(ms / area)
        if len(times) >= _TRUSTED:
            self._publish(key[0])

    def ms(self, area: int, count: int) -> float | None:
        """The predicted time of a call."""
        curve = self._curve(area)
        return None if curve is None else area * self._at(curve, count)

    def least_ms_each(self, area: int) -> float | None:
        """The time of one row (or image) in the most efficient call that is known."""
        curve = self._curve(area)
        return None if curve is None else area * min(each / count for count, each in curve)

    def _curve(self, area: int) -> Curve | None:
        curves, bucket = self._curves, _bucket(area)
        if not curves:
            return None
        nearest = bucket if bucket in curves else min(curves, key=lambda b: abs(b - bucket))
        return curves[nearest]

    def _at(self, curve: Curve, count: int) -> float:
        place = bisect_left(curve, (count, -math.inf))
        if place < len(curve) and (place == 0 or curve[place][0] == count):
            return curve[place][1]  # below the least count known: no cheaper
        if len(curve) == 1:
            known, each = curve[0]
            return each if self._flat_beyond else each * count / known
        # Between two counts, or beyond the last in the direction of the last two.
        (low, at_low), (high, at_high) = curve[min(place, len(curve) - 1) - 1 :][:2]
        value = at_low + (at_high - at_low) * (count - low) / (high - low)
        return value if place < len(curve) else max(value, at_high)

    def _publish(self, bucket: int) -> None:
        cells = [(count, times) for (b, count), times in self._times.items() if b == bucket]
        curve = tuple(sorted((n, median_low(t)) for n, t in cells if len(t) >= _TRUSTED))
        self._curves = {**self._curves, bucket: curve}  # replaced whole: others are reading


def _bucket(area: int) -> int:
    return round(2.0 * math.log2(area))


class CostTable:
    """The costs of denoiser calls by rows and of decoder calls by images."""

    def __init__(self, *, learns: bool = True) -> None:
        self.learns = learns  # a given table can be kept as it is
        self.steps = CallCosts(flat_beyond=True)
        self.decodes = CallCosts(flat_beyond=False)

    @classmethod
    def of(
        cls,
        steps_ms: Mapping[tuple[int, int], float],
        decodes_ms: Mapping[tuple[int, int], float],
        *,
        learns: bool = True,
    ) -> "CostTable":
        """A table of known times: (area, rows) -> ms of a step, (area, images) -> ms to decode."""
        table = cls(learns=learns)
        for costs, known in ((table.steps, steps_ms), (table.decodes, decodes_ms)):
            for (area, count), ms in known.items():
                costs.set(area, count, ms)
        return table

    def is_known(self, area: int) -> bool:
        return self.steps.ms(area, 1) is not None

    def image_us(self, *, area: int, rows: int, num_steps: int, num_single: int = 0) -> int:
        """Device time of a whole image in full calls: what it costs everybody.

        `num_single` of its steps have one row in place of `rows`.
        Whole microseconds, so that sums over the queue return to exactly nothing.
        """
        row_steps = rows * (num_steps - num_single) + num_single
        row_ms = self.steps.least_ms_each(area)
        if row_ms is None:
            return max(1, round(_GUESS_US * area * row_steps))
        decode_ms = self.decodes.ms(area, 1) or 0.0
        return max(1, round(1e3 * (row_steps * row_ms + decode_ms)))

    def alone_ms(self, *, area: int, rows: int, num_steps: int, num_single: int = 0) -> float:
        """Time until an image with so many steps left is done, with the device to itself."""
        step_ms, single_ms = (self.steps.ms(area, count) or 0.0 for count in (rows, 1))
        steps_ms = (num_steps - num_single) * step_ms + num_single * single_ms
        return steps_ms + (self.decodes.ms(area, 1) or 0.0)
