"""Which images are in the next denoiser call.

The images in flight stand in an order of urgency; the first one steps. How many of the next ones
join it follows from the measured costs: the number with the least *sum of waiting*. Stepping the
first n together takes ms(rows of n), and everybody waits for that; stepping them one after the
other, the i-th waits for i calls and everybody behind for all n. So

- where ms(rows) is linear, as on a CPU, a shared call makes the first ones wait and saves nobody
  anything: the most urgent image steps alone, and a short request overtakes a long one;
- where ms(rows) is flat, as on a GPU that is not full, all join;
- in between, more join the longer the queue is, because each millisecond saved is saved for
  everybody behind: latency while there is room, throughput when there is none.

Behind are not only those that wait: who comes while these last finds them done the sooner, and is
counted as well, by the rate at which images came of late. Without that each call is the best one
for the present queue, and the next queue is longer (`test_step_loop.py`,
`test_serving_benchmark.py`).
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from engine.batching.fair_queue import SAFETY
from engine.batching.jobs import Slot
from engine.batching.step_costs import CostTable

# An image is due when it has waited for this many times what it still needs: a short one overtakes
# a long one, and the long one is overtaken for a bounded time only.
STRETCH = 4.0
MAX_PASSED_OVER = 32  # calls without a step; after that, no later than all others passed over so


def by_urgency(slots: Sequence[Slot], costs: CostTable, now: float) -> list[Slot]:
    """Those passed over for long; those that may miss their deadline, the earliest first; then by
    priority, and then by when they are due."""
    left_s = {id(slot): slot.remaining_us(costs) / 1e6 for slot in slots}
    needed_s = SAFETY * sum(left_s.values())

    def urgency(slot: Slot) -> tuple[bool, float, int, float]:
        deadline = slot.job.deadline
        is_urgent = deadline is not None and deadline - now < needed_s
        return (
            slot.passed_over < MAX_PASSED_OVER,
            deadline if is_urgent and deadline is not None else math.inf,
            -slot.job.priority,
            slot.job.submitted + STRETCH * left_s[id(slot)],
        )

    return sorted(slots, key=urgency)


def how_many_join(alone: Sequence[float], together: Sequence[float], num_behind: int) -> int:
    """The best number of images for a call, at least 1.

    `alone[i]` is the time of image i by itself, `together[n - 1]` that of the first n in one call;
    `num_behind` images wait behind all of these, or will. Equal sums go to the larger call.
    """
    one_by_one = list(accumulate(alone))
    num_waiting = len(alone) + num_behind
    best, least = 1, 0.0
    served = 0.0  # sum of what each of the first n waits for, one by one
    for n, (end, call) in enumerate(zip(one_by_one, together, strict=True), start=1):
        served += end
        more = num_waiting * call - served - (num_waiting - n) * end
        if n == 1 or more <= least:
            best, least = n, more
    return best


def choose_call(
    order: Sequence[Slot],
    costs: CostTable,
    *,
    max_rows: int,
    row_cost: Callable[[Slot], float],
    num_behind: int,
) -> list[Slot]:
    """The first of `order`, and those of its shape that join it, at most `max_rows` rows.

    A request that was in a call that killed the worker steps by itself: should it be the cause, it
    takes nobody with it the next time.
    """
    if len(order) == 1:
        return list(order)
    used, fitting = 0.0, list[Slot]()
    for slot in can_share(order):
        used += slot.image.rows * row_cost(slot)
        if fitting and used > max_rows:
            break  # one image goes through, however large it is
        fitting.append(slot)
    area = fitting[0].job.area
    if not costs.is_known(area):
        return fitting  # try it, and learn
    rows = accumulate(slot.image.rows for slot in fitting)
    together = [costs.steps.ms(area, count) or 0.0 for count in rows]
    alone = [costs.steps.ms(area, slot.image.rows) or 0.0 for slot in fitting]
    behind = len(order) - len(fitting) + num_behind
    return fitting[: how_many_join(alone, together, behind)]


def can_share(order: Sequence[Slot]) -> list[Slot]:
    """Those that may share a call with the first one, in their order."""
    first = order[0]
    same_shape = [slot for slot in order if slot.image.shape_key == first.image.shape_key]
    if first.job.deaths:
        return [slot for slot in same_shape if slot.job is first.job]
    return [slot for slot in same_shape if not slot.job.deaths]
