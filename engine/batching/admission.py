"""Whether a request may wait: by the device time that it costs, by its deadline, by its tenant.

Arithmetic on what is known already: no model call, no lock held for long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.batching.config import BatcherConfig
from engine.batching.fair_queue import SAFETY, FairQueue
from engine.batching.jobs import Job, Slot
from engine.batching.shared_calls import how_many_join
from engine.batching.step_costs import CostTable
from engine.errors import DeadlineExceeded, QueueFull
from engine.requests import check_priority

_LEAST_RETRY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """What is wanted of one limit: images, or microseconds of the device."""

    asked: int
    own: int  # of the same tenant, waiting
    total: int  # of all tenants, waiting
    limit: int
    others_wait: bool
    max_share: float

    def excess(self) -> float:
        """By how much it is too much; 0 where it is not.

        A tenant may hold its share while others wait, and the rest of the limit even where the
        queue is full of others' work; nobody passes twice the limit that way.
        """
        if not self.total:
            return 0.0  # larger than the whole queue: it may still wait in an empty one
        share = self.limit * (self.max_share if self.others_wait else 1.0)
        over_share = self.own + self.asked - share
        over_limit = self.total + self.asked - self.limit
        if self.own + self.asked <= self.limit * (1.0 - self.max_share):
            over_limit -= self.limit
        return float(max(over_share, over_limit, 0.0))


def check_request(job: Job) -> None:
    """Raise for what is wrong with it whoever else is there."""
    if error := job.reason_to_drop(job.submitted):
        raise error
    check_priority(job.priority)


def check_room(job: Job, queue: FairQueue, config: BatcherConfig, costs: CostTable) -> None:
    """Raise `QueueFull` where the waiting work would pass a limit.

    While no costs are known, only images are counted.
    """
    check_images(len(job.waiting), job.tenant, queue, config)
    own_images, own_us = queue.held_by(job.tenant)
    work = _Demand(
        asked=len(job.waiting) * job.image_us,
        own=own_us,
        total=queue.cost_us,
        limit=1000 * config.max_queued_ms,
        others_wait=queue.num_images > own_images,
        max_share=config.max_tenant_share,
    )
    if costs.is_known(job.area) and (excess := work.excess()):
        retry_after_s = max(excess / 1e6, _LEAST_RETRY_S)
        raise QueueFull(
            f"the queue holds {work.total / 1e6:.1f} s of work ({work.own / 1e6:.1f} s of the same "
            f"tenant), {work.asked / 1e6:.1f} s more would pass its limit of "
            f"{work.limit / 1e6:g} s; try again in {retry_after_s:.1f} s, or ask for fewer steps "
            "or images",
            retry_after_s=retry_after_s,
        )


def check_images(asked: int, tenant: str, queue: FairQueue, config: BatcherConfig) -> None:
    """Raise `QueueFull` where so many images more would pass the limit of images."""
    own, _ = queue.held_by(tenant)
    images = _Demand(
        asked=asked,
        own=own,
        total=queue.num_images,
        limit=config.max_queued_images,
        others_wait=queue.num_images > own,
        max_share=config.max_tenant_share,
    )
    if excess := images.excess():
        retry_after_s = max(excess / images.total * queue.cost_us / 1e6, _LEAST_RETRY_S)
        raise QueueFull(
            f"the queue holds {images.total} images ({images.own} of the same tenant), "
            f"{images.asked} more would pass its limit of {images.limit}; "
            f"try again in {retry_after_s:.1f} s",
            retry_after_s=retry_after_s,
        )


def check_deadline(
    job: Job,
    queue: FairQueue,
    in_flight: Sequence[Slot],
    config: BatcherConfig,
    costs: CostTable,
) -> None:
    """Raise `DeadlineExceeded` where the predicted end is past the deadline.

    The request's own work is what it takes in the calls that it would share, as far as their costs
    are known. So a device that is idle refuses only what it could not do in any case.
    """
    if job.deadline is None:
        return
    own_s = 0.0
    if costs.is_known(job.area):
        own_s = _own_s(job, config, costs, num_others=len(in_flight) + queue.num_images)
    predicted_s = _ahead_s(job.deadline, queue, in_flight, config, costs) + own_s
    allowed_s = job.deadline - job.submitted
    if predicted_s > allowed_s:
        raise DeadlineExceeded(
            f"the deadline cannot be met: {predicted_s:.3f} s are predicted ({own_s:.3f} s of it "
            f"the request's own), {allowed_s:.3f} s are allowed; allow more time, ask for fewer "
            "steps or images, or try again when less waits"
        )


def _ahead_s(
    deadline: float,
    queue: FairQueue,
    in_flight: Sequence[Slot],
    config: BatcherConfig,
    costs: CostTable,
) -> float:
    """Time until a request with this deadline has its turn, predicted, `SAFETY` times.

    Ahead of it is what the order of the queue puts there: earlier deadlines, waiting and in flight,
    and the end of the image that leaves a slot first, if none is free.
    """
    ahead_us = float(queue.ahead_us(deadline))
    later = list[Slot]()
    for slot in in_flight:
        if slot.job.deadline is not None and slot.job.deadline <= deadline:
            ahead_us += slot.remaining_us(costs)
        else:
            later.append(slot)
    if len(later) == config.max_images_in_flight:
        ahead_us += min(slot.alone_us(costs) for slot in later)
    return SAFETY * ahead_us / 1e6


def _own_s(job: Job, config: BatcherConfig, costs: CostTable, *, num_others: int) -> float:
    """Time from its first step to its last picture, among others that are taken to be like it."""
    most = min(config.max_images_in_flight, max(config.max_batch_rows // job.rows, 1))
    num_images = min(num_others + 1, most)
    together = [costs.steps.ms(job.area, n * job.rows) or 0.0 for n in range(1, num_images + 1)]
    alone = [together[0]] * num_images
    joined = how_many_join(alone, together, num_others + 1 - num_images)
    decode_ms = costs.decodes.ms(job.area, 1) or 0.0
    single = job.costs_of(job.num_steps)["num_single"]
    single_ms = costs.steps.ms(job.area, joined) or 0.0
    one_ms = (job.num_steps - single) * together[joined - 1] + single * single_ms + decode_ms
    return max(one_ms / 1e3, len(job.waiting) * job.image_us / 1e6)
