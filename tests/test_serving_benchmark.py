"""The schedulers that the benchmark compares: all carry out the same requests, and honestly."""

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.serving.cancel import summary as cancel_summary
from benchmarks.serving.kept_runs import KeptRuns
from benchmarks.serving.load_figure import draw_load_figure
from benchmarks.serving.mix import (
    STEPS,
    arrival_times,
    deadline_s,
    make_concepts,
    make_requests,
)
from benchmarks.serving.open_loop import Arrival, Outcome, replay, summary
from benchmarks.serving.run_to_end import RunToEnd, RunToEndLoop
from benchmarks.serving.settings import Settings
from benchmarks.serving.spread import fit_line, percentile_ratio, reached
from engine.batching.config import BatcherConfig
from engine.batching.step_loop import StepLoop
from engine.errors import InvalidRequest, ShuttingDown
from engine.requests import GenerationRequest
from tests.batcher_toy import (
    AREA,
    Clock,
    Heard,
    Milliseconds,
    ToyModel,
    flat,
    linear,
    plan,
    table_of,
)
from tests.fakes import FakeDenoiser, make_pipeline

OURS, STATIC, ONE_BY_ONE = "step-level", "static batching", "one at a time"
WINDOW_S = 0.005
AREAS = (AREA, AREA * 96**2 // 64**2)  # of the mix


class Rig:
    """One of the systems on the toy, in open loop; its calls, or an arrival, let time pass."""

    def __init__(
        self,
        name: str,
        step_ms: Milliseconds = linear,
        *,
        max_images: int = 4,
        window_s: float = WINDOW_S,
        **config: Any,
    ) -> None:
        self.clock = Clock()
        self.model = ToyModel(self.clock, step_ms=step_ms)
        given, costs = BatcherConfig(**config), table_of(step_ms, areas=AREAS)
        self.loop: Any
        if name == OURS:
            self.loop = StepLoop(self.model, given, costs, clock=self.clock)
        else:
            is_static = name == STATIC
            self.loop = RunToEndLoop(
                self.model,
                given,
                costs,
                max_images=max_images if is_static else 1,
                window_s=window_s if is_static else 0.0,
                clock=self.clock,
            )

    def replay(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        return replay(
            self.loop.submit,
            arrivals,
            clock=self.clock,
            wait_until=self._wait_until,
            wait_for_ends=lambda _ends, _count: self._work_while(lambda: True),
        )

    def _wait_until(self, moment: float) -> None:
        self._work_while(lambda: self.clock.now < moment, until=moment)
        self.clock.now = max(self.clock.now, moment)

    def _work_while(self, goes_on: Callable[[], bool], *, until: float = float("inf")) -> None:
        while self.loop.has_work and goes_on():
            wait_s = self.loop.wait_s() if isinstance(self.loop, RunToEndLoop) else 0.0
            if wait_s:
                # A little more: sums of times are not exact.
                self.clock.now = min(self.clock.now + wait_s + 1e-9, until)
            else:
                self.loop.tick()


def arrivals_of(steps: Sequence[int], *, rate: float, allowed_s: float = 1e6) -> list[Arrival]:
    times = arrival_times(len(steps), rate, seed=0)
    return [
        Arrival(plan=plan(count, seed=index, rows=1 + index % 2), at_s=at_s, allowed_s=allowed_s)
        for index, (count, at_s) in enumerate(zip(steps, times, strict=True))
    ]


@pytest.mark.parametrize("name", [OURS, STATIC, ONE_BY_ONE])
@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(st.sampled_from([1, 3, 8]), min_size=1, max_size=30),
    rate=st.sampled_from([20.0, 100.0, 1000.0]),
    allowed_s=st.sampled_from([0.01, 0.05, 1e6]),
    max_queued=st.sampled_from([2, 64]),
)
def test_every_request_ends_exactly_once(
    name: str, steps: list[int], rate: float, allowed_s: float, max_queued: int
) -> None:
    rig = Rig(name, max_queued_images=max_queued)
    outcomes = rig.replay(arrivals_of(steps, rate=rate, allowed_s=allowed_s))
    assert [one.num_ends for one in outcomes] == [1] * len(steps)
    assert all(one.ended in ("finished", "refused", "given up") for one in outcomes)
    assert not rig.model.live, "an image was left in the model"
    if allowed_s == 1e6 and max_queued == 64:
        assert all(one.ended == "finished" for one in outcomes)


def test_static_batches_are_of_one_kind_run_to_their_end_and_wait_for_a_window() -> None:
    rig = Rig(STATIC)
    # Two of three steps arrive 4 ms apart and share a batch; the one of eight steps has its own.
    times, steps = (0.0, 0.001, 0.004, 0.5), (3, 8, 3, 3)
    outcomes = rig.replay(
        [
            Arrival(plan=plan(count, seed=index, rows=1), at_s=at_s, allowed_s=1e6)
            for index, (count, at_s) in enumerate(zip(steps, times, strict=True))
        ]
    )
    assert rig.model.calls == [[0, 2]] * 3 + [[1]] * 8 + [[3]] * 3
    # The window, three calls of two rows and the decoding of two: 5 + 6 + 2 ms.
    assert outcomes[0].latency_s == pytest.approx(0.013, abs=1e-6)
    assert outcomes[3].latency_s == pytest.approx(0.005 + 0.004, abs=1e-6)


def test_a_full_batch_does_not_wait_and_a_call_has_its_most_rows() -> None:
    rig = Rig(STATIC, max_batch_rows=6)
    arrivals = [
        Arrival(plan=plan(2, seed=index, rows=2), at_s=0.0, allowed_s=1e6) for index in range(8)
    ]
    rig.replay(arrivals)
    assert rig.model.calls == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2 + [[6, 7]] * 2
    assert rig.model.most_rows == 6


def test_one_at_a_time_is_first_in_first_out() -> None:
    rig = Rig(ONE_BY_ONE)
    outcomes = rig.replay(arrivals_of([8, 1, 3, 1], rate=1000.0))
    assert rig.model.calls == [[0]] * 8 + [[1]] + [[2]] * 3 + [[3]]
    ends = [one.end_s for one in outcomes]
    assert ends == sorted(ends)


def test_peers_refuse_what_the_work_ahead_makes_impossible() -> None:
    rig = Rig(ONE_BY_ONE)
    arrivals = [
        Arrival(plan=plan(20, seed=0, rows=1), at_s=0.0, allowed_s=1.0),
        # 21 ms are ahead; its own are 2.
        Arrival(plan=plan(1, seed=1, rows=1), at_s=0.0, allowed_s=0.010),
        Arrival(plan=plan(1, seed=2, rows=1), at_s=0.0, allowed_s=0.100),
    ]
    assert [one.ended for one in rig.replay(arrivals)] == ["finished", "refused", "finished"]


def test_peers_drop_what_is_too_late_when_its_turn_comes() -> None:
    rig = Rig(ONE_BY_ONE)
    rig.model.begin_ms = 50.0  # which nobody has predicted
    arrivals = [
        Arrival(plan=plan(5, seed=seed, rows=1), at_s=0.0, allowed_s=0.060) for seed in range(2)
    ]
    assert [one.ended for one in rig.replay(arrivals)] == ["finished", "given up"]
    assert rig.model.calls == [[0]] * 5


@pytest.mark.parametrize("max_images", [1, 4])
def test_peers_draw_the_images_that_a_request_has_alone(max_images: int) -> None:
    pipeline = make_pipeline(FakeDenoiser())
    plans = [
        pipeline.plan(
            GenerationRequest(
                prompt="a cat",
                seed=seed,
                num_inference_steps=2 + 2 * (seed % 2),
                guidance_scale=1.0 if seed % 3 else 4.0,
            )
        )
        for seed in range(8)
    ]
    alone = list[Any]()
    for one in plans:
        images = pipeline.begin(one)
        while not images[0].is_done:
            pipeline.step(images)
        alone.append(pipeline.decode(images)[0])
    scheduler = RunToEnd(pipeline, max_images=max_images, window_s=0.01)
    heard, over = [Heard() for _ in plans], threading.Semaphore(0)
    for one, listener in zip(plans, heard, strict=True):

        def listen(event: Any, listener: Heard = listener) -> None:
            listener(event)
            if listener.is_over:
                over.release()

        scheduler.submit(one, listen)
    for _ in plans:
        assert over.acquire(timeout=60)
    scheduler.close()
    for listener, expected in zip(heard, alone, strict=True):
        # 8-bit pictures of the same numbers; a batch may round the last bit of a float otherwise.
        drawn = listener.images[0].image.astype(int)
        assert np.abs(drawn - expected.astype(int)).max() <= 1


def test_a_closed_peer_tells_those_who_wait() -> None:
    model = ToyModel(Clock(), step_ms=flat)
    scheduler = RunToEnd(model, costs=table_of(flat), max_images=4, window_s=1e6)
    heard = Heard()
    scheduler.submit(plan(1), heard)
    scheduler.close()
    assert isinstance(heard.error, ShuttingDown)
    with pytest.raises(InvalidRequest, match="one image a request"):
        scheduler.submit(plan(1, num_images=2), heard)


def test_a_failing_call_ends_its_batch_alone() -> None:
    rig = Rig(STATIC)
    rig.model.broken_seeds = {1}
    outcomes = rig.replay(arrivals_of([3, 3, 8], rate=1000.0))
    assert [one.ended for one in outcomes] == ["failed", "failed", "finished"]


def test_another_load_is_the_same_requests_at_times_that_are_stretched() -> None:
    slow, fast = (arrival_times(50, rate, seed=3) for rate in (2.0, 8.0))
    np.testing.assert_allclose(slow, 4.0 * np.array(fast))
    assert slow == sorted(slow)
    assert arrival_times(50, 2.0, seed=3) == slow != arrival_times(50, 2.0, seed=4)
    # Poisson: 20,000 gaps have the mean and the standard deviation 1 / rate; theirs err by 1 %.
    gaps = np.diff(arrival_times(20_001, 5.0, seed=0))
    np.testing.assert_allclose([gaps.mean(), gaps.std()], 0.2, rtol=0.05)


def test_the_mix_has_its_shares_exactly() -> None:
    requests = make_requests(100, make_concepts(8), seed=1)
    steps = [request.num_inference_steps for request in requests]
    assert {count: steps.count(count) / 100 for count in STEPS} == pytest.approx(STEPS)
    assert all(("<x" in one.prompt) == bool(one.concepts) for one in requests)


def test_latency_counts_from_when_a_request_was_due() -> None:
    rig = Rig(ONE_BY_ONE)
    arrivals = arrivals_of([3, 3], rate=1000.0)

    def late_submit(*words: Any, **named: Any) -> Any:
        rig.clock.pass_ms(100.0)
        return rig.loop.submit(*words, **named)

    outcomes = replay(
        late_submit, arrivals, clock=rig.clock, wait_until=rig._wait_until,
        wait_for_ends=lambda _ends, _count: rig._work_while(lambda: True),
    )  # fmt: skip
    assert all(one.latency_s > 0.1 for one in outcomes)
    assert summary([outcomes])["latency_ms"]["count"] == 2


def nearly_flat(area: int, rows: int) -> float:
    """A GPU that is not full: 16 rows take 1.6 times as long as one."""
    return 12.0 + 0.5 * (rows - 1)


def by_rows(area: int, rows: int) -> float:
    """Two cores: nothing is gained by sharing a call."""
    return 6.0 * rows


def two_cores(area: int, rows: int) -> float:
    """What calls of the embedded model took on two cores of an Intel Xeon (the page's figures of
    2026-11-24); for larger images, whose calls are not on the page, a little more than their area.
    """
    per_call = np.interp(rows, (1, 2, 4, 8, 16), (7.9, 13.9, 25.4, 44.7, 87.2))
    return float(per_call) * (area / AREA) ** 1.2


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Millions of calls of arithmetic: with their types checked they take ten times as long."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def replay_mix(
    load: float,
    name: str,
    step_ms: Milliseconds,
    *,
    count: int = 300,
    seed: int = 3,
    is_patient: bool = False,
) -> list[Outcome]:
    """The benchmark's own mix of requests, on a clock that only calls let pass."""
    requests = make_requests(count, make_concepts(8), seed=seed)
    plans = [
        plan(
            request.num_inference_steps,
            seed=index,
            side=8 * (request.width or 64) // 64,
            rows=1 if request.guidance_scale == 1.0 else 2,
        )
        for index, request in enumerate(requests)
    ]
    costs = table_of(step_ms, areas=AREAS)
    alone_s = [
        costs.alone_ms(
            area=one.width * one.height,
            rows=len(one.weights),
            num_steps=one.request.num_inference_steps,
        )
        / 1e3
        for one in plans
    ]
    times = arrival_times(count, load * count / sum(alone_s), seed=seed)
    arrivals = [
        Arrival(
            plan=one,
            at_s=at_s,
            allowed_s=math.inf if is_patient else deadline_s(own_s),
            alone_s=own_s,
        )
        for one, own_s, at_s in zip(plans, alone_s, times, strict=True)
    ]
    # Static batches as in the benchmark: as many images as ours, and no window, its best there.
    config: dict[str, Any] = {"max_queued_images": count}
    most = BatcherConfig().max_images_in_flight
    return Rig(name, step_ms, max_images=most, window_s=0.0, **config).replay(arrivals)


def outcomes_at(load: float, name: str, step_ms: Milliseconds) -> dict[str, Any]:
    """With deadlines."""
    return summary([replay_mix(load, name, step_ms)])


@pytest.mark.parametrize("load", [0.5, 0.8, 1.0, 1.2])
@pytest.mark.usefixtures("unchecked")
def test_where_calls_cost_the_same_step_level_batching_is_ahead_in_everything(load: float) -> None:
    ours = outcomes_at(load, OURS, nearly_flat)
    for other in (STATIC, ONE_BY_ONE):
        theirs = outcomes_at(load, other, nearly_flat)
        assert ours["in_time_share"] >= theirs["in_time_share"]
        for measure in ("latency_ms", "slowdown"):
            for share in ("median", "p99"):
                assert ours[measure][share] < theirs[measure][share], (other, measure, share)


@pytest.mark.parametrize("load", [0.5, 0.8, 1.0, 1.2])
@pytest.mark.usefixtures("unchecked")
def test_where_sharing_gains_nothing_nobody_waits_long_for_little(load: float) -> None:
    """The longest images wait instead, within their deadlines: p99 in milliseconds is theirs."""
    ours = outcomes_at(load, OURS, by_rows)
    for other in (STATIC, ONE_BY_ONE):
        theirs = outcomes_at(load, other, by_rows)
        assert ours["in_time_share"] >= theirs["in_time_share"]
        assert ours["latency_ms"]["median"] < theirs["latency_ms"]["median"]
        assert ours["slowdown"]["p99"] < theirs["slowdown"]["p99"]


@pytest.mark.parametrize(
    "load", [0.8, *(pytest.param(load, marks=pytest.mark.slow) for load in (0.5, 1.0, 1.2))]
)
@pytest.mark.usefixtures("unchecked")
def test_on_a_cpu_callers_who_wait_for_ever_wait_less(load: float) -> None:
    """All get their images from all, so nobody's p99 is the better for what it refused.

    The p99 is that of a few dozen images, and differs between seeds more than between systems: it
    is of 4800 requests.
    """
    found = {
        name: summary(
            [
                replay_mix(load, name, two_cores, count=600, seed=seed, is_patient=True)
                for seed in range(8)
            ]
        )
        for name in (OURS, STATIC, ONE_BY_ONE)
    }
    ours = found.pop(OURS)
    assert ours["in_time_share"] == 1.0
    for name, theirs in found.items():
        assert theirs["in_time_share"] == 1.0
        for share in ("median", "p90", "p99"):
            assert ours["latency_ms"][share] < theirs["latency_ms"][share], (name, share)


def test_goodput_leaves_out_what_came_too_late() -> None:
    arrivals = arrivals_of([3] * 20, rate=100.0, allowed_s=0.05)
    outcomes = [
        Outcome(arrival=a, end_s=a.at_s + (0.01 if n % 2 else 0.06), ended="finished", num_ends=1)
        for n, a in enumerate(arrivals)
    ]
    point = summary([outcomes])
    assert point["requests"] == 18  # the first tenth is the warm-up
    assert point["in_time_share"] == 0.5
    assert point["goodput_per_s"] < 0.75 * point["images_per_s"]


def test_line_and_its_error_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    x = np.arange(20.0) * 250.0
    y = 5e7 + 3.0 * x + random.normal(0.0, 1e4, 20)
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    line = fit_line(list(x), list(y))
    np.testing.assert_allclose([line.slope, line.intercept], [slope, intercept], rtol=1e-6)
    np.testing.assert_allclose(line.slope_error, np.sqrt(covariance[0, 0]), rtol=1e-6)
    assert line.is_flat == (abs(slope) <= 2.0 * line.slope_error)
    assert not fit_line(list(x), list(y + 100.0 * x)).is_flat
    with pytest.raises(ValueError, match="three points"):
        fit_line([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])


def test_ratio_of_percentiles_has_the_interval_of_its_resamples() -> None:
    random = np.random.default_rng(0)
    theirs = [list(random.exponential(1000.0, 400)) for _ in range(6)]
    ours = [[0.8 * one for one in run] for run in theirs]
    # The same requests are drawn for both: a system that takes 0.8 of each one's time has no error.
    same = percentile_ratio(ours, theirs, 99.0)
    np.testing.assert_allclose([same.ratio, same.low, same.high], 0.8, rtol=1e-12)
    # Independent ones, exponential: the error of ln p99 is sqrt(99 / n) / ln(100) = 0.044 each for
    # n = 2400, of their ratio 0.062; the interval is 4 of those wide, give or take a third.
    other = [list(random.exponential(1000.0, 400)) for _ in range(6)]
    found = percentile_ratio(other, theirs, 99.0)
    assert found.low < found.ratio < found.high
    assert found.low < 1.0 < found.high
    assert 0.16 < np.log(found.high / found.low) < 0.33
    # One percentile of all is not the mean of those of the runs.
    expected = np.percentile(np.concatenate(other), 99) / np.percentile(np.concatenate(theirs), 99)
    assert found.ratio == pytest.approx(expected)


def test_a_benchmark_that_was_stopped_goes_on(tmp_path: Path) -> None:
    settings = Settings.trial(tmp_path)
    KeptRuns("load", settings, folder=tmp_path).get("a", lambda: [1.5, "finished"])
    (file,) = tmp_path.glob("load-*.jsonl")
    with file.open("a") as torn:
        torn.write('["b", [2.')  # killed while it wrote
    kept = KeptRuns("load", settings, folder=tmp_path)
    assert kept.get("a", lambda: pytest.fail("measured twice")) == [1.5, "finished"]
    assert kept.get("b", lambda: (3, 4)) == [3, 4]
    assert KeptRuns("load", settings, folder=tmp_path).get("b", lambda: None) == [3, 4]
    # Other settings, and another part, are other measurements.
    other = dataclasses.replace(settings, load_s=16.0)
    assert KeptRuns("load", other, folder=tmp_path).get("a", lambda: 7) == 7
    assert KeptRuns("latency", settings, folder=tmp_path).get("a", lambda: 8) == 8
    kept.discard()
    assert KeptRuns("load", settings, folder=tmp_path).get("a", lambda: 9) == 9


def test_an_outcome_is_the_same_after_it_was_kept() -> None:
    outcomes = Rig(OURS).replay(arrivals_of([3, 8, 1], rate=100.0))
    kept = json.loads(json.dumps([one.times for one in outcomes]))
    again = [Outcome.of(one.arrival, times) for one, times in zip(outcomes, kept, strict=True)]
    assert again == outcomes


def test_what_never_comes_is_later_than_all_that_does() -> None:
    assert reached([3.0, 1.0, 2.0], 3, 0.99) == 3.0
    assert reached([3.0, 1.0, 2.0], 100, 0.03) == 3.0
    assert reached([3.0, 1.0, 2.0], 100, 0.04) is None
    arrivals = arrivals_of([8] * 10, rate=1000.0, allowed_s=0.05)
    found = summary([Rig(ONE_BY_ONE).replay(arrivals)])
    assert found["refused_share"] > 0.1
    assert found["of_all_ms"]["p99"] is None and found["latency_ms"]["p99"] > 0.0


def test_cancel_counts_the_calls_that_were_under_way_and_those_begun_afterwards() -> None:
    calls = [
        ("hold", 0.0, 0.0, []),
        ("step", 0.0, 1.0, [1]),  # under way at the cancel, at 0.9
        ("step", 1.0, 2.0, [1]),
        ("hold", 1.5, 1.5, []),  # under way when the server hears
        ("step", 2.0, 3.0, [1, 2]),
        ("release", 3.0, 3.1, [1]),
        ("step", 3.1, 4.0, [2]),
    ]
    found = cancel_summary({1: 0.9, 2: 9.0}, calls)
    assert (found["cancelled"], found["done_before"]) == (1, 1)
    assert found["heard_ms"]["max"] == pytest.approx(600.0)
    assert found["slot_free_ms"]["max"] == pytest.approx(2100.0)
    assert found["calls_until_free"]["max"] == 2
    assert found["calls_since_cancel"]["max"] == 3
    assert found["calls_begun_with_it_afterwards"]["max"] == 1


def test_figure_shows_each_system() -> None:
    point = {"latency_ms": {"count": 1, "median": 100.0, "p99": 900.0}, "goodput_per_s": 2.0}
    loads = {load: {OURS: point, STATIC: point, ONE_BY_ONE: point} for load in ("0.5", "1", "1.2")}
    one = np.asarray(draw_load_figure(loads, loads))
    loads["1"] = {**loads["1"], STATIC: {**point, "goodput_per_s": 1.0}}
    other = np.asarray(draw_load_figure(loads, loads))
    # Only the panel of the goodput has changed.
    changed = np.flatnonzero((one != other).any(axis=(0, 2)))
    assert len(changed) and changed.min() > 850
