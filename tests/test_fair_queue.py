"""Who is admitted next: deadlines, priorities, fair shares, and that nobody waits for ever."""

import itertools
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batching.fair_queue import MAX_CREDIT, MAX_OVERTAKING, FairQueue
from engine.batching.jobs import Job
from engine.planner import GenerationPlan
from tests.batcher_toy import plan

NOW = 1000.0
PLENTY_US = 10**9  # a backlog that makes deadlines of seconds urgent
_numbers = itertools.count(1)


def job(tenant: str = "a", us: int = 100, *, images: int = 1, **fields: float | None) -> Job:
    """A request in the order of its making; a `deadline` is in seconds from `NOW`."""
    if fields.get("deadline") is not None:
        fields["deadline"] = NOW + float(fields["deadline"] or 0.0)
    made = Job(
        plan=_plan(images),
        on_event=lambda _event: None,
        tenant=tenant,
        number=next(_numbers),
        **fields,  # type: ignore[arg-type]
    )
    made.image_us = us
    return made


@cache
def _plan(images: int) -> GenerationPlan:
    return plan(num_images=images)


def queue_of(*jobs: Job) -> FairQueue:
    queue = FairQueue()
    for one in jobs:
        queue.push(one)
    return queue


def take(queue: FairQueue, *, backlog_us: int = 0) -> Job:
    chosen = queue.choose(NOW, backlog_us)
    queue.take_image(chosen)
    return chosen


def take_all(queue: FairQueue, *, backlog_us: int = 0) -> list[Job]:
    order = list[Job]()
    while len(queue):
        order.append(take(queue, backlog_us=backlog_us))
    return order


def test_equal_requests_go_in_order_of_arrival() -> None:
    jobs = [job(images=2) for _ in range(3)]
    assert take_all(queue_of(*jobs)) == [one for one in jobs for _ in range(2)]


def test_a_higher_priority_goes_first() -> None:
    low, high, middle = job(priority=0), job(priority=9), job(priority=5)
    assert take_all(queue_of(low, high, middle)) == [high, middle, low]


def test_a_deadline_that_could_be_missed_goes_before_priority() -> None:
    low, late, soon = job(priority=9), job(deadline=5.0), job(deadline=2.0)
    assert take_all(queue_of(low, late, soon), backlog_us=PLENTY_US) == [soon, late, low]


def test_a_deadline_with_time_for_everything_waits_its_turn() -> None:
    low, late, soon = job(priority=9), job(deadline=5.0), job(deadline=2.0)
    assert take_all(queue_of(low, late, soon), backlog_us=10**6) == [low, late, soon]


def test_what_is_removed_is_never_chosen_and_costs_nothing() -> None:
    jobs = [job("a", images=3, deadline=1.0), job("b", 7, images=2), job("a", priority=3)]
    queue = queue_of(*jobs)
    queue.remove(jobs[0])
    assert (queue.num_images, queue.cost_us) == (3, 2 * 7 + 100)
    assert queue.held_by("a") == (1, 100)
    assert set(take_all(queue, backlog_us=PLENTY_US)) == {jobs[1], jobs[2]}
    assert (queue.num_images, queue.cost_us, queue.held_by("b")) == (0, 0, (0, 0))


def test_a_request_that_comes_back_keeps_its_place() -> None:
    first, second = job(images=2), job()
    queue = queue_of(first, second)
    first_image = queue.take_image(queue.choose(NOW, 0))
    queue.remove(first)
    first.waiting.appendleft(first_image)
    queue.push(first)
    assert take_all(queue) == [first, first, second]


# Fair shares ------------------------------------------------------------------------------------

costs = st.lists(st.integers(1, 1000), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None, database=None)
@given(of_a=costs, of_b=costs, first=st.sampled_from("ab"))
def test_tenants_with_endless_work_get_equal_device_time(
    of_a: list[int], of_b: list[int], first: str
) -> None:
    """At any moment within a quantum (the largest image) and an image of each other."""
    endless = {"a": itertools.cycle(of_a), "b": itertools.cycle(of_b)}
    largest = max(*of_a, *of_b)
    queue = FairQueue()
    for tenant in (first, "a", "a", "b", "b"):  # at least one of each waits at all times
        queue.push(job(tenant, next(endless[tenant])))
    served = Counter[str]()
    for _ in range(60):
        chosen = take(queue)
        served[chosen.tenant] += chosen.image_us
        queue.push(job(chosen.tenant, next(endless[chosen.tenant])))
        assert abs(served["a"] - served["b"]) <= 2 * largest


def test_many_small_requests_buy_no_more_than_few_large_ones() -> None:
    small, large = [job("a", 10) for _ in range(200)], [job("b", 1000) for _ in range(2)]
    order = [one.tenant for one in take_all(queue_of(*small, *large))]
    # 2000 each; a quantum of 1000 is a hundred small ones.
    assert order == ["a"] * 100 + ["b"] + ["a"] * 100 + ["b"]


def test_one_request_at_a_time_gets_its_share_too() -> None:
    queue = queue_of(*(job("a") for _ in range(40)), job("b"))
    served = Counter[str]()
    for _ in range(30):
        chosen = take(queue)
        served[chosen.tenant] += 1
        if chosen.tenant == "b":
            queue.push(job("b"))
    assert served["a"] == served["b"]


def test_one_who_comes_late_has_no_claim_on_the_past() -> None:
    queue = queue_of(*(job("a") for _ in range(40)))
    for _ in range(20):
        take(queue)
    for _ in range(40):
        queue.push(job("b"))
    served = Counter(take(queue).tenant for _ in range(20))
    assert abs(served["a"] - served["b"]) <= 1


@settings(max_examples=50, deadline=None, database=None)
@given(of_a=costs, of_b=costs)
def test_tight_deadlines_on_everything_buy_a_bounded_advance(
    of_a: list[int], of_b: list[int]
) -> None:
    endless = {"a": itertools.cycle(of_a), "b": itertools.cycle(of_b)}
    deadline = {"a": 0.5, "b": None}
    largest = max(*of_a, *of_b)
    # Two of b, so that one waits at all times: who leaves gives its unused share up.
    queue = queue_of(job("b", of_b[0]), job("b", of_b[0]), job("a", of_a[0], deadline=0.5))
    served = Counter[str]()
    for _ in range(60):
        chosen = take(queue, backlog_us=PLENTY_US)
        served[chosen.tenant] += chosen.image_us
        tenant = chosen.tenant
        queue.push(job(tenant, next(endless[tenant]), deadline=deadline[tenant]))
        # What it may borrow, and then the law of the round robin.
        assert served["a"] - served["b"] <= (MAX_CREDIT + 2) * largest


def test_a_debt_is_not_forgotten_by_leaving() -> None:
    """One urgent request at a time is no way around the shares: its tenant stays in debt."""
    queue = queue_of(*(job("b") for _ in range(60)))
    advance = most = 0
    for _ in range(30):
        queue.push(job("a", deadline=0.5))  # and nothing else of this tenant's waits
        chosen = take(queue, backlog_us=PLENTY_US)
        while chosen.tenant != "a":
            advance -= 1
            chosen = take(queue, backlog_us=PLENTY_US)
        advance += 1
        most = max(most, advance)
    assert most <= MAX_CREDIT + 2


# Starvation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flood", ["priority", "deadlines"])
@pytest.mark.parametrize("tenants", [1, 3])
@pytest.mark.parametrize("older", [0, 4])
def test_a_low_priority_gets_in_however_much_comes_after_it(
    flood: str, tenants: int, older: int
) -> None:
    """The bound of the docstring, with work that never ends and goes before by all other rules."""
    of_flood = {"priority": {"priority": 9.0}, "deadlines": {"deadline": 0.1}}[flood]
    names = itertools.cycle([f"t{n}" for n in range(tenants)])
    sizes = itertools.cycle([300, 20, 999, 1, 450])
    queue = queue_of(*(job("poor", 100) for _ in range(older)), poor := job("poor", 100))
    for _ in range(2 * tenants):
        queue.push(flooding(next(names), next(sizes), of_flood))
    passed = 0
    while (chosen := take(queue, backlog_us=PLENTY_US)) is not poor:
        passed += chosen.image_us
        bound = (older + 1) * (MAX_OVERTAKING * (tenants + 1) + 1) * 999 + older * 100
        assert passed <= bound
        if chosen.tenant != "poor":
            queue.push(flooding(chosen.tenant, next(sizes), of_flood))


def flooding(tenant: str, us: int, fields: dict[str, float]) -> Job:
    made = job(tenant, us, deadline=fields.get("deadline"))
    made.priority = int(fields.get("priority", 0))
    return made
