"""Requests that arrive when they arrive, whatever is still under way, and what became of them.

Latency counts from the moment at which a request was due, not from when it could be sent: a system
that keeps callers from sending does not look fast for it (no coordinated omission).
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.serving.spread import reached, spread
from engine.batching.events import Event, Failed, Finished
from engine.errors import DeadlineExceeded, QueueFull
from engine.planner import GenerationPlan

# Arrivals of the beginning find an empty system: they are carried out and not counted.
WARM_UP_SHARE = 0.1


class Submit(Protocol):
    """How a request is handed to a scheduler."""

    def __call__(
        self,
        plan: GenerationPlan,
        on_event: Callable[[Event], None],
        *,
        deadline: float | None = None,
    ) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request, and when it comes."""

    plan: GenerationPlan
    at_s: float  # from the start
    allowed_s: float  # from then to its deadline; infinite where it has none
    alone_s: float = 1.0  # what it takes with nobody else there


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a request; seconds from the start."""

    arrival: Arrival
    sent_s: float = 0.0
    end_s: float = 0.0
    ended: str = ""  # "finished", "refused" at once, "given up" later, or "failed"
    num_ends: int = 0  # must be 1

    @classmethod
    def of(cls, arrival: Arrival, times: Sequence[Any]) -> "Outcome":
        """From its `times`."""
        sent_s, end_s, ended = times
        return cls(arrival=arrival, sent_s=sent_s, end_s=end_s, ended=ended, num_ends=1)

    @property
    def times(self) -> tuple[float, float, str]:
        """What JSON can hold of it, once it has ended."""
        return self.sent_s, self.end_s, self.ended

    @property
    def latency_s(self) -> float:
        return self.end_s - self.arrival.at_s

    @property
    def is_good(self) -> bool:
        """Whether its image came before its deadline."""
        return self.ended == "finished" and self.latency_s <= self.arrival.allowed_s


def replay(
    submit: Submit,
    arrivals: Sequence[Arrival],
    *,
    clock: Callable[[], float] = time.monotonic,
    wait_until: Callable[[float], None] | None = None,
    wait_for_ends: Callable[[threading.Semaphore, int], None] | None = None,
) -> list[Outcome]:
    """Send each request at its time; returns when all have ended.

    `wait_until` and `wait_for_ends` are for a clock that does not pass by itself.
    """
    sleep_until = wait_until or (lambda moment: time.sleep(max(0.0, moment - clock())))
    ends = threading.Semaphore(0)
    outcomes = [Outcome(arrival=arrival) for arrival in arrivals]
    start = clock()

    def end(outcome: Outcome, how: str) -> None:
        outcome.end_s = clock() - start
        outcome.ended = how
        outcome.num_ends += 1
        ends.release()

    for outcome in outcomes:
        arrival = outcome.arrival
        sleep_until(start + arrival.at_s)
        outcome.sent_s = clock() - start

        def listen(event: Event, outcome: Outcome = outcome) -> None:
            if isinstance(event, Finished):
                end(outcome, "finished")
            elif isinstance(event, Failed):
                late = isinstance(event.error, DeadlineExceeded)
                end(outcome, "given up" if late else "failed")

        try:
            due = start + arrival.at_s + arrival.allowed_s
            submit(arrival.plan, listen, deadline=due if math.isfinite(due) else None)
        except (QueueFull, DeadlineExceeded):
            end(outcome, "refused")
    (wait_for_ends or _acquire)(ends, len(outcomes))
    return outcomes


def _acquire(ends: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        ends.acquire()


def counted(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Those of a run after its warm-up."""
    return outcomes[int(WARM_UP_SHARE * len(outcomes)) :]


def summary(runs: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """Rates and latencies of the requests after the warm-up, of all runs of a point together.

    Rates are of what ended between the end of the warm-up and the last arrival, over that time.
    """
    span_s, images, good = 0.0, 0, 0
    seen, p99_ms_of_runs = list[Outcome](), list[float | None]()
    for outcomes in runs:
        later = counted(outcomes)
        first, last = later[0].arrival.at_s, later[-1].arrival.at_s
        span_s += last - first
        within = [one for one in outcomes if first <= one.end_s <= last]
        images += sum(one.ended == "finished" for one in within)
        good += sum(one.is_good for one in within)
        p99_ms_of_runs.append(spread(latencies_ms(later)).get("p99"))
        seen += later
    finished = [one for one in seen if one.ended == "finished"]
    return {
        "requests": len(seen),
        "images_per_s": images / span_s,
        "goodput_per_s": good / span_s,
        "in_time_share": sum(one.is_good for one in seen) / len(seen),
        "refused_share": sum(one.ended == "refused" for one in seen) / len(seen),
        "given_up_share": sum(one.ended == "given up" for one in seen) / len(seen),
        "failed": sum(one.ended == "failed" for one in seen),
        "latency_ms": spread(latencies_ms(seen)),
        "of_all_ms": {
            name: reached([1e3 * one.latency_s for one in finished], len(seen), share)
            for name, share in (("p90", 0.9), ("p99", 0.99))
        },
        "p99_ms_of_runs": p99_ms_of_runs,
        "slowdown": spread([one.latency_s / one.arrival.alone_s for one in finished]),
        "latest_send_ms": max(1e3 * (one.sent_s - one.arrival.at_s) for one in seen),
    }


def latencies_ms(outcomes: Sequence[Outcome]) -> list[float]:
    """Of those that have their image."""
    return [1e3 * one.latency_s for one in outcomes if one.ended == "finished"]
