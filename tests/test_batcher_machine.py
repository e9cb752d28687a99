"""The batcher under any order of events: nothing is lost, told twice, leaked or over its limit."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine.batching.fair_queue import MAX_OVERTAKING
from engine.batching.shared_calls import MAX_PASSED_OVER
from engine.batching.step_costs import CostTable
from engine.batching.step_loop import MAX_RESTARTS
from engine.errors import Cancelled, DeadlineExceeded, NumericalError, QueueFull, WorkerDied
from tests.batcher_toy import Heard, Milliseconds, Rig, flat, linear, plan

MAX_IN_FLIGHT = 3
MAX_ROWS = 6
MAX_QUEUED = 8


def staircase(area: int, count: int) -> float:
    """Between linear and flat, as devices are: a start, and a step every four rows."""
    return area / 64 * (2.0 + (count + 3) // 4)


CURVES: dict[str, Milliseconds] = {"flat": flat, "linear": linear, "staircase": staircase}


class BatcherMachine(RuleBasedStateMachine):
    """Requests of all kinds come, are cancelled, expire, and kill workers, in any order."""

    @initialize(curve=st.sampled_from(sorted(CURVES)), learns=st.booleans(), goes_on=st.booleans())
    def start(self, curve: str, learns: bool, goes_on: bool) -> None:
        self.rig = Rig(
            step_ms=CURVES[curve],
            costs=CostTable() if learns else None,
            max_images_in_flight=MAX_IN_FLIGHT,
            max_batch_rows=MAX_ROWS,
            max_queued_images=MAX_QUEUED,
            max_queued_ms=500,
        )
        self.rig.model.goes_on = goes_on
        self.accepted: list[Heard] = []
        self.deaths = 0
        # By request number: (images that were older, work taken past it since).
        self.passed: dict[int, int] = {}
        self._watch_admissions()

    def _watch_admissions(self) -> None:
        queue = self.rig.loop._queue
        take_image = queue.take_image

        def watched(job: Any) -> int:
            for waiting in queue:
                if waiting.number < job.number:
                    self.passed[waiting.number] = self.passed.get(waiting.number, 0) + job.image_us
            self.passed[job.number] = 0
            return take_image(job)

        queue.take_image = watched

    @rule(
        steps=st.integers(1, 6),
        images=st.integers(1, 3),
        rows=st.integers(1, 2),
        side=st.sampled_from([8, 8, 16]),
        tenant=st.sampled_from("abc"),
        priority=st.sampled_from([0, 0, 5, 9]),
        within_ms=st.sampled_from([None, None, 1.0, 30.0, 300.0]),
        kind=st.sampled_from(["sound"] * 8 + ["nan", "broken", "deadly"]),
        preview_every=st.integers(0, 2),
    )
    def submit(
        self, steps: int, images: int, rows: int, side: int, tenant: str, kind: str, **more: Any
    ) -> None:
        seed = 10 * (1 + len(self.accepted))
        model = self.rig.model
        {"nan": model.nan_seeds, "broken": model.broken_seeds, "deadly": model.deadly_seeds}.get(
            kind, set[int]()
        ).add(seed)
        fields = {"num_images": images, "rows": rows, "side": side, "seed": seed, **more}
        refused_early = self.is_refused_early(steps, tenant=tenant, **fields)
        try:
            heard = self.rig.submit(steps, tenant=tenant, **fields)
        except (QueueFull, DeadlineExceeded):
            assert refused_early, "what is refused is refused before it is planned"
            return
        assert not refused_early, "what is refused before it is planned is refused in any case"
        self.accepted.append(heard)

    def is_refused_early(self, steps: int, **fields: Any) -> bool:
        options = {name: fields.pop(name) for name in ("tenant", "priority")}
        within_ms = fields.pop("within_ms")
        deadline = None if within_ms is None else self.rig.clock() + within_ms / 1e3
        try:
            self.rig.loop.check_early(plan(steps, **fields), deadline=deadline, **options)
        except (QueueFull, DeadlineExceeded):
            return True
        return False

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        heard = data.draw(st.sampled_from(self.accepted))
        assert heard.job is not None
        heard.job.cancel()

    @precondition(lambda self: self.accepted)
    @rule(data=st.data(), within_ms=st.sampled_from([None, 1.0, 30.0, 300.0]))
    def change_deadline(self, data: st.DataObject, within_ms: float | None) -> None:
        """As where another caller waits for the same request; it may have ended long ago."""
        job = data.draw(st.sampled_from(self.accepted)).job
        assert job is not None
        now = self.rig.clock()
        self.rig.loop.set_deadline(job, None if within_ms is None else now + within_ms / 1e3)

    @rule(times=st.integers(1, 5))
    def tick(self, times: int) -> None:
        for _ in range(times):
            self.rig.loop.tick()
            self.limits_hold()

    @rule(ms=st.sampled_from([1.0, 20.0, 400.0]))
    def time_passes(self, ms: float) -> None:
        self.rig.clock.pass_ms(ms)

    @rule(polls=st.integers(0, 3))
    def worker_dies_at_the_next_call(self, polls: int) -> None:
        self.rig.model.dies_next = True
        self.rig.model.polls_until_ready = polls

    @invariant()
    def limits_hold(self) -> None:
        loop, model = self.rig.loop, self.rig.model
        assert len(loop.in_flight) <= MAX_IN_FLIGHT
        assert model.most_rows <= MAX_ROWS, "rows of a call, by what they cost"
        for slot in loop.in_flight:
            assert slot.passed_over <= MAX_PASSED_OVER + MAX_IN_FLIGHT

    @invariant()
    def accounts_are_right(self) -> None:
        queue = self.rig.loop._queue
        assert queue.num_images == sum(len(job.waiting) for job in queue)
        assert queue.cost_us == sum(len(job.waiting) * job.image_us for job in queue)
        held = [queue.held_by(tenant) for tenant in "abc"]
        assert (queue.num_images, queue.cost_us) == tuple(map(sum, zip(*held, strict=True)))

    @invariant()
    def deadlines_are_in_order(self) -> None:
        queue = self.rig.loop._queue
        found = [job.deadline for job in queue._by_deadline]
        assert found == sorted(job.deadline for job in queue if job.deadline is not None)

    @invariant()
    def the_model_holds_what_the_batcher_does(self) -> None:
        loop = self.rig.loop
        known = {slot.image for slot in loop.in_flight}
        known |= {image for job in loop._queue for image in (job.images or {}).values()}
        assert self.rig.model.live == known

    @invariant()
    def nobody_is_passed_over_beyond_the_bound(self) -> None:
        """Each older image, and then this one, waits for so much work of others at most."""
        jobs = list(self.rig.loop._queue)
        if not jobs:
            return
        largest = max((heard.job.image_us for heard in self.accepted if heard.job), default=1)
        for place, job in enumerate(jobs):
            older = sum(len(other.waiting) for other in jobs[:place]) + MAX_QUEUED
            bound = (older + 1) * (3 * MAX_OVERTAKING + 1) * largest
            assert self.passed.get(job.number, 0) <= bound

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.run(max_ticks=2000)
        assert not self.rig.model.live, "images that nobody holds any more"
        queue = self.rig.loop._queue
        assert (queue.num_images, queue.cost_us, queue._tenants) == (0, 0, {})
        for heard in self.accepted:
            self.ended_rightly(heard)

    def ended_rightly(self, heard: Heard) -> None:
        assert heard.is_over  # once: `Heard` refuses events after the last
        job, error = heard.job, heard.error
        assert job is not None
        pictures = {index: int(done.image[0, 0, 0]) for index, done in heard.images.items()}
        seed = job.plan.request.seed
        assert all(picture == (seed + i) % 256 for i, picture in pictures.items())
        match error:
            case None:
                assert len(pictures) == job.plan.request.num_images
            case Cancelled():
                assert job.cancelled
            case DeadlineExceeded():
                assert heard.deadline_at_the_end is not None
            case NumericalError():
                assert seed in self.rig.model.nan_seeds
            case WorkerDied():
                assert job.deaths == MAX_RESTARTS + 1
            case _:
                assert str(error) == "out of memory"


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, database=None
)
