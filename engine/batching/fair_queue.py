"""Who is admitted next: the waiting requests, in an order that starves nobody.

An image is taken of, in this order:

1. the oldest request, if too much work has passed it (the bound below);
2. the earliest deadline among those that could miss theirs if they waited for all that is there;
3. the highest priority; among tenants of that priority by deficit round robin (Shreedhar and
   Varghese 1995) in units of predicted device time; for one tenant in order of arrival.

Fair share: each round gives each waiting tenant a quantum, the cost of the largest image that was
next in turn when the round began, and takes the cost of what it gets. So two tenants who always
wait have had the same device time to within a quantum and an image, however many or large their
requests are. Urgent requests may borrow `MAX_CREDIT` quanta ahead of their tenant's turn, no more:
tight deadlines on everything do not buy a larger share.

No starvation: at most `MAX_OVERTAKING` x (tenants waiting) x (cost of the largest image) of work is
taken past the oldest request before it gets its next image. A request that k older images wait
before is thus reached after k + 1 times that, whatever priorities and deadlines others have. (One
round of the round robin is far less, so equal requests never come to it.)
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.batching.jobs import Job

MAX_CREDIT = 4  # quanta
MAX_OVERTAKING = 8
# Predictions err, and others join calls: work ahead of a deadline counts for more than it is.
SAFETY = 1.2


@dataclass(slots=True, eq=False)
class _Tenant:
    name: str
    jobs: list[Job] = field(default_factory=list[Job])  # by priority, then arrival
    deficit_us: int = 0  # what it may take; below zero: what it has borrowed
    round: int = -1  # in which it was last given its quantum
    is_visited: bool = False  # its turn has begun: it has its quantum and may spend it
    num_images: int = 0
    cost_us: int = 0


class FairQueue:
    """Waiting requests by arrival, by deadline and by tenant. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._by_arrival: list[Job] = []
        self._by_deadline: list[Job] = []  # those that have one
        self._tenants: dict[str, _Tenant] = {}
        self._turns: deque[_Tenant] = deque()
        self._round = 0
        self._round_us = 0  # the quantum of this round
        self._overtaken_us = 0  # taken since the oldest request last got an image
        self.num_images = 0
        self.cost_us = 0

    def __iter__(self) -> Iterator[Job]:
        """All requests in order of arrival."""
        return iter(self._by_arrival)

    def __len__(self) -> int:
        return len(self._by_arrival)

    def push(self, job: Job) -> None:
        """Add a request with images that wait; one that was here before keeps its place."""
        insort(self._by_arrival, job, key=_number)
        if job.deadline is not None:
            insort(self._by_deadline, job, key=_deadline)
        tenant = self._tenants.get(job.tenant)
        if tenant is None:
            tenant = self._tenants[job.tenant] = _Tenant(job.tenant)
            self._turns.append(tenant)
        insort(tenant.jobs, job, key=_rank)
        self._count(tenant, len(job.waiting), job.image_us)

    def remove(self, job: Job) -> None:
        """Take a request out, with all of its images that still wait."""
        tenant = self._tenants[job.tenant]
        self._count(tenant, -len(job.waiting), job.image_us)
        self._forget(tenant, job)

    def set_deadline(self, job: Job, deadline: float | None) -> None:
        """Change the deadline of a request, which may wait here or be gone already."""
        waits = any(one is job for one in self._by_arrival)
        if waits and job.deadline is not None:
            _discard(self._by_deadline, job, _deadline)
        job.deadline = deadline
        if waits and deadline is not None:
            insort(self._by_deadline, job, key=_deadline)

    def take_image(self, job: Job) -> int:
        """Take the next image of a request that was chosen, on its tenant's account."""
        tenant = self._tenants[job.tenant]
        quantum = self._quantum()
        is_oldest = job is self._by_arrival[0]
        self._overtaken_us = 0 if is_oldest else self._overtaken_us + job.image_us
        if len(self.tenants) == 1:
            tenant.deficit_us = 0  # nobody waits to whom it could owe
        else:
            # Beyond its credit only as the oldest, which is not on its account.
            floor = min(tenant.deficit_us, -MAX_CREDIT * quantum)
            tenant.deficit_us = max(tenant.deficit_us - job.image_us, floor)
        index = job.waiting.popleft()
        self._count(tenant, -1, job.image_us)
        if not job.waiting:
            self._forget(tenant, job)
        return index

    def choose(self, now: float, backlog_us: int) -> Job:
        """Whose image is next; `backlog_us` is the work that is in flight or waits."""
        oldest = self._by_arrival[0]
        if self._overtaken_us >= MAX_OVERTAKING * len(self.tenants) * self._quantum():
            return oldest
        return self._urgent(now, backlog_us) or self._in_turn()

    @property
    def tenants(self) -> list[str]:
        """Those who wait."""
        return [tenant.name for tenant in self._turns if tenant.jobs]

    def held_by(self, tenant: str) -> tuple[int, int]:
        """(images, microseconds) of one tenant's that wait."""
        found = self._tenants.get(tenant)
        return (found.num_images, found.cost_us) if found else (0, 0)

    def ahead_us(self, deadline: float) -> int:
        """Work of requests whose deadline is not later than this one."""
        place = bisect_left(self._by_deadline, deadline, key=_deadline)
        while place < len(self._by_deadline) and _deadline(self._by_deadline[place]) == deadline:
            place += 1
        return sum(len(job.waiting) * job.image_us for job in self._by_deadline[:place])

    def _urgent(self, now: float, backlog_us: int) -> Job | None:
        needed_s = SAFETY * backlog_us / 1e6
        alone, quantum = len(self.tenants) == 1, self._quantum()
        for job in self._by_deadline:
            if _deadline(job) - now >= needed_s:
                return None  # there is time for everything, for this one and all that follow
            left_us = self._tenants[job.tenant].deficit_us - job.image_us
            if alone or left_us >= -MAX_CREDIT * quantum:
                return job
        return None

    def _in_turn(self) -> Job:
        priority = max(tenant.jobs[0].priority for tenant in self._turns if tenant.jobs)
        eligible = [t for t in self._turns if t.jobs and t.jobs[0].priority == priority]
        self._skip_rounds(eligible)
        while True:
            tenant = self._turns[0]
            takes_part = tenant in eligible or not tenant.jobs
            if takes_part and not tenant.is_visited:
                tenant.is_visited = True
                self._give_quantum(tenant, eligible)
            if tenant in eligible and tenant.deficit_us >= tenant.jobs[0].image_us:
                return tenant.jobs[0]
            tenant.is_visited = False
            if not tenant.jobs and tenant.deficit_us >= 0:  # an absent one has paid its debt
                self._leave(tenant)
            else:
                self._turns.rotate(-1)

    def _give_quantum(self, tenant: _Tenant, eligible: list[_Tenant]) -> None:
        """The same to all in one round; an absent one pays its debt with it."""
        if tenant.round == self._round:  # all have had theirs
            self._round += 1
            self._round_us = max(t.jobs[0].image_us for t in eligible)
        tenant.round = self._round
        tenant.deficit_us += self._round_us

    def _skip_rounds(self, eligible: list[_Tenant]) -> None:
        """Debts may be of many rounds: those in which nobody could take anything go at once."""
        quantum = max(tenant.jobs[0].image_us for tenant in eligible)
        missing = min(tenant.jobs[0].image_us - tenant.deficit_us for tenant in eligible)
        if (rounds := missing // quantum - 1) > 0:
            for tenant in [t for t in self._turns if t in eligible or not t.jobs]:
                tenant.deficit_us += rounds * quantum

    def _quantum(self) -> int:
        return max((tenant.jobs[0].image_us for tenant in self._turns if tenant.jobs), default=1)

    def _count(self, tenant: _Tenant, images: int, image_us: int) -> None:
        self.num_images += images
        self.cost_us += images * image_us
        tenant.num_images += images
        tenant.cost_us += images * image_us

    def _forget(self, tenant: _Tenant, job: Job) -> None:
        _discard(self._by_arrival, job, _number)
        _discard(tenant.jobs, job, _rank)
        if job.deadline is not None:
            _discard(self._by_deadline, job, _deadline)
        if not tenant.jobs and tenant.deficit_us >= 0:
            self._leave(tenant)
        if not self._by_arrival:  # nobody is left to whom anything could be owed
            self._tenants.clear()
            self._turns.clear()
            self._overtaken_us = 0

    def _leave(self, tenant: _Tenant) -> None:
        del self._tenants[tenant.name]
        self._turns.remove(tenant)


def _number(job: Job) -> int:
    return job.number


def _deadline(job: Job) -> float:
    assert job.deadline is not None
    return job.deadline


def _rank(job: Job) -> tuple[int, int]:
    return (-job.priority, job.number)


def _discard(jobs: list[Job], job: Job, key: Callable[[Job], Any]) -> None:
    """Remove from a list sorted by `key`; equal keys stand beside each other."""
    place = bisect_left(jobs, key(job), key=key)
    while jobs[place] is not job:
        place += 1
    del jobs[place]
