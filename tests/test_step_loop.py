"""The batcher tick by tick, on a clock that the test holds: who steps, who is refused, who dies."""

import dataclasses

import pytest

from engine.batching.config import BatcherConfig
from engine.batching.events import StepDone
from engine.batching.shared_calls import MAX_PASSED_OVER
from engine.batching.step_costs import CostTable
from engine.batching.step_loop import DECODE_STRETCH, MAX_RESTARTS, RATE_OVER
from engine.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    NumericalError,
    QueueFull,
    WorkerDied,
)
from engine.guidance import GuidedCalls
from tests.batcher_toy import Heard, Rig, flat, linear, plan

# Who steps --------------------------------------------------------------------------------------


def test_on_a_linear_device_the_short_request_overtakes_the_long_one() -> None:
    rig = Rig(step_ms=linear)
    long = rig.submit(50, seed=1)
    for _ in range(5):
        rig.loop.tick()
    short = rig.submit(4, seed=2)
    for _ in range(5):
        rig.loop.tick()
    assert short.is_finished and not long.is_finished
    assert rig.model.calls == [[1]] * 5 + [[2]] * 4 + [[1]]
    rig.run()
    assert long.is_finished


def test_on_a_flat_device_all_step_together() -> None:
    rig = Rig(step_ms=flat)
    for seed in range(8):
        rig.submit(5, seed=seed)
    rig.run()
    assert [len(call) for call in rig.model.calls] == [8] * 5


@pytest.mark.parametrize(
    ("gain", "pause_ms", "is_shared"), [(0.12, 1.0, True), (0.02, 1.0, False), (0.12, 1e4, False)]
)
def test_sharing_that_gains_a_little_is_for_those_who_come_later(
    gain: float, pause_ms: float, is_shared: bool
) -> None:
    """Nobody waits behind these two, and the first has its image later for it: but the device is
    free sooner for whoever comes. Where nobody is expected, or next to nothing is gained, the first
    goes first."""
    rig = Rig(step_ms=lambda area, rows: linear(area, rows) * (1.0 - gain * (rows > 1)))
    for seed in range(RATE_OVER):
        rig.submit(1, seed=seed, rows=1)
        rig.run()
        rig.clock.pass_ms(pause_ms)
    for seed in (100, 101):
        rig.submit(10, seed=seed, rows=1)
    rig.loop.tick()
    assert rig.model.calls[-1] == ([100, 101] if is_shared else [100])


def test_without_a_table_sharing_is_tried_and_learned() -> None:
    """From calls that it makes alone it learns that this device gains nothing by sharing."""
    rig = Rig(step_ms=linear, costs=CostTable(), max_images_in_flight=2)
    for seed in range(2):
        rig.submit(10, seed=seed, rows=1)
    rig.submit(6, seed=2, rows=1)
    rig.run()
    assert len(rig.model.calls[0]) == 2
    for seed in (3, 4):
        rig.submit(10, seed=seed, rows=1)
    rig.run()
    assert all(len(call) == 1 for call in rig.model.calls[-20:])


def test_an_image_in_flight_is_never_passed_over_for_long() -> None:
    rig = Rig(step_ms=linear, max_images_in_flight=2)
    poor = rig.submit(4, seed=1)
    rig.loop.tick()
    for seed in range(100, 300):
        if poor.is_finished:
            break
        rig.submit(1, seed=seed, priority=9)
        rig.loop.tick()
    assert poor.is_finished
    gaps = "".join("x" if 1 in call else "." for call in rig.model.calls).split("x")
    assert max(map(len, gaps)) <= MAX_PASSED_OVER + 1


def test_a_higher_priority_takes_the_next_free_slot_and_the_next_step() -> None:
    rig = Rig(step_ms=linear, max_images_in_flight=2)
    rig.submit(3, seed=1)
    rig.submit(3, seed=2)
    rig.loop.tick()
    rig.submit(2, seed=3)
    rig.submit(2, seed=4, priority=9)
    rig.run()
    # Of equal priority, the shorter one is due sooner.
    assert rig.model.calls == [[1]] * 3 + [[4]] * 2 + [[3]] * 2 + [[2]] * 3


def test_beginning_others_does_not_hold_up_a_step() -> None:
    """Encoding takes as long as five steps here: one request begins between two steps."""
    rig = Rig(step_ms=flat)
    rig.model.begin_ms = 5.0
    for seed in range(4):
        rig.submit(10, seed=seed)
    rig.run()
    log = " ".join(name for name in rig.model.log if name in ("begin", "step"))
    assert log.startswith("begin step begin step begin step begin step step")


# Decoding ---------------------------------------------------------------------------------------


def test_decoding_goes_between_steps_one_image_at_a_time() -> None:
    rig = Rig(step_ms=flat, decode_ms=linear)
    done = [rig.submit(2, seed=seed) for seed in range(4)]
    rig.submit(9, seed=9)
    rig.run()
    between = " ".join(n for n in rig.model.log if n in ("step", "decode"))
    assert between == "step step " + "decode step " * 4 + "step step step decode"
    assert all(heard.is_finished for heard in done)


def test_decoding_many_costs_no_more_than_a_little_over_one() -> None:
    # Two images take a tenth longer than one, three a half.
    stretch = {1: 1.0, 2: 1.1, 3: 1.5, 4: 2.0, 8: 4.0, 16: 8.0}
    rig = Rig(step_ms=flat, decode_ms=lambda _, count: 10.0 * stretch[count])
    for seed in range(4):
        rig.submit(2, seed=seed)
    rig.submit(9, seed=9)
    seen = list[float]()
    while rig.loop.has_work:
        before = rig.clock.now
        rig.loop.tick()
        seen.append(1e3 * (rig.clock.now - before))
    assert max(seen) <= 1.0 + DECODE_STRETCH * 10.0
    assert rig.model.log.count("decode") == 3


def test_where_nobody_waits_all_decode_at_once() -> None:
    rig = Rig(step_ms=flat)
    rig.submit(3, num_images=5)
    rig.run()
    assert rig.model.log.count("decode") == 1


def test_a_picture_that_is_not_finite_fails_its_own_request() -> None:
    rig = Rig()
    rig.model.nan_seeds = {1}
    bad, good = rig.submit(seed=0, num_images=2), rig.submit(seed=7)
    rig.run()
    assert isinstance(bad.error, NumericalError) and good.is_finished
    assert not rig.model.live


# Refusals ---------------------------------------------------------------------------------------


def test_work_is_limited_by_its_cost() -> None:
    # 10 steps of 2 rows at 1 ms a row, and 1 ms to decode: 21 ms an image.
    rig = Rig(step_ms=linear, max_images_in_flight=1, max_queued_ms=100)
    rig.submit(10)
    rig.loop.tick()
    for _ in range(4):
        rig.submit(10)
    with pytest.raises(QueueFull, match=r"0\.1 s of work") as refusal:
        rig.submit(10)
    # 5 ms over the limit, but never sooner than a tenth of a second.
    assert refusal.value.retry_after_s == pytest.approx(0.1)
    rig.submit(4)  # 9 ms: fits
    with pytest.raises(QueueFull) as refusal:
        rig.submit(1000)
    assert refusal.value.retry_after_s == pytest.approx((4 * 21 + 9 + 2001 - 100) / 1e3)


def test_larger_images_and_more_rows_cost_more() -> None:
    rig = Rig(step_ms=linear, max_images_in_flight=1, max_queued_ms=1000)
    rig.submit(10)
    rig.loop.tick()
    costs = list[int]()
    for fields in ({}, {"rows": 1}, {"side": 16}, {"num_images": 2}):
        before = rig.loop._queue.cost_us
        rig.submit(10, **fields)
        costs.append(rig.loop._queue.cost_us - before)
    assert costs == [21_000, 11_000, 84_000, 42_000]


def test_one_tenant_cannot_shut_out_the_others() -> None:
    rig = Rig(max_images_in_flight=1, max_queued_images=8, max_tenant_share=0.75)
    rig.submit(5, tenant="hog")
    rig.loop.tick()
    for _ in range(8):  # alone, it may have all of it
        rig.submit(5, tenant="hog")
    with pytest.raises(QueueFull, match=r"8 images \(8 of the same tenant\)"):
        rig.submit(5, tenant="hog")
    rig.submit(5, tenant="poor")  # a quarter is kept for those who have little
    rig.submit(5, tenant="poor")
    with pytest.raises(QueueFull):
        rig.submit(5, tenant="poor")
    while rig.loop._queue.held_by("hog")[0] > 6:
        rig.loop.tick()
    rig.submit(5, tenant="poor")
    with pytest.raises(QueueFull):  # there is room, but three quarters are its share now
        rig.submit(5, tenant="hog")


def test_an_idle_device_refuses_only_what_it_could_not_do() -> None:
    rig = Rig(step_ms=linear)
    # 10 steps of 2 ms and 1 ms to decode.
    with pytest.raises(DeadlineExceeded, match=r"0\.021 s are predicted .* 0\.020 s are allowed"):
        rig.submit(10, within_ms=20.0)
    heard = rig.submit(10, within_ms=21.5)
    rig.run()
    assert heard.is_finished


def test_a_deadline_that_the_queue_makes_impossible_is_refused_at_once() -> None:
    rig = Rig(step_ms=linear)
    ahead = [rig.submit(10, within_ms=100.0, seed=seed) for seed in range(4)]  # 84 ms
    with pytest.raises(DeadlineExceeded, match="try again when less waits"):
        rig.submit(10, within_ms=110.0)
    rig.submit(10, within_ms=125.0)
    rig.submit(1, within_ms=50.0)  # goes before them: its deadline is earlier
    rig.run()
    assert all(heard.is_finished for heard in ahead)


def test_among_others_a_request_takes_as_long_as_the_calls_that_it_shares() -> None:
    def step_ms(area: int, rows: int) -> float:
        return 8.0 + rows  # 10 ms alone, 24 ms for eight

    idle, busy = Rig(step_ms=step_ms), Rig(step_ms=step_ms)
    for seed in range(7):
        busy.submit(20, seed=seed)
    busy.loop.tick()
    assert idle.submit(10, within_ms=150.0).error is None
    with pytest.raises(DeadlineExceeded):
        busy.submit(10, within_ms=150.0)
    heard = busy.submit(10, within_ms=260.0)
    busy.run()
    assert heard.is_finished


def test_a_request_leaves_when_its_deadline_is_lost_and_not_only_when_it_is_over() -> None:
    rig = Rig(step_ms=linear)
    heard = rig.submit(10, within_ms=30.0)
    deadline = rig.clock.now + 0.030
    rig.model.step_ms = lambda area, rows: 3 * linear(area, rows)  # slower than the table says
    rig.run()
    assert isinstance(heard.error, DeadlineExceeded) and "cannot be met" in str(heard.error)
    assert rig.clock.now < deadline
    assert not rig.model.live


def test_without_a_table_no_deadline_is_refused() -> None:
    rig = Rig(step_ms=linear, costs=CostTable())
    assert rig.submit(10, within_ms=20.0).error is None


def test_a_priority_beyond_the_scale_is_refused() -> None:
    for priority in (-1, 10):
        with pytest.raises(InvalidRequest, match="priority must be between 0 and 9"):
            Rig().submit(priority=priority)


@pytest.mark.parametrize(
    "config",
    [
        {"max_queued_ms": 0},
        {"max_tenant_share": 0.0},
        {"max_tenant_share": 1.5},
        {"cost_measurement_s": -1.0},
        {"result_cache_bytes": -1},
    ],
)
def test_configuration_names_what_is_wrong(config: dict[str, float]) -> None:
    (name,) = config
    with pytest.raises(ConfigError, match=name):
        BatcherConfig(**config)  # type: ignore[arg-type]


# Calls that the model makes by itself ------------------------------------------------------------


def test_a_model_goes_on_until_an_image_is_done() -> None:
    rig = Rig()
    rig.model.goes_on = True
    first, second = rig.submit(3, seed=1), rig.submit(5, seed=2)
    rig.run()
    assert rig.model.calls == [[1, 2]] * 3 + [[2]] * 2
    assert rig.model.at_most == [3, 2]
    assert [e.step for e in second.events if isinstance(e, StepDone)] == [3, 5]
    for heard, rows in ((first, 4.0), (second, (3 * 4 + 2 * 2) / 5)):
        assert heard.job is not None
        timings = heard.job.timings()
        assert timings.denoiser_calls == heard.job.num_steps and timings.mean_batch_rows == rows


def test_a_model_goes_on_to_the_next_preview() -> None:
    """It shows the image as it stands then, and not a step later."""
    rig = Rig()
    rig.model.goes_on = True
    heard = rig.submit(8, seed=1, preview_every=3)
    rig.run()
    assert rig.model.at_most == [3, 3, 2]
    previews = {e.step: e.preview for e in heard.events if isinstance(e, StepDone)}
    shown = {step: preview.max() for step, preview in previews.items() if preview is not None}
    assert shown == {3: 3, 6: 6}


def test_a_model_goes_on_while_the_rows_stay_the_same() -> None:
    rig = Rig()
    rig.model.goes_on = True
    guided = dataclasses.replace(plan(9), guided=GuidedCalls(2, 6))
    rig.loop.submit(guided, Heard())
    rig.run()
    assert rig.model.at_most == [2, 4, 3]


def test_a_model_goes_on_for_a_bounded_time() -> None:
    rig = Rig(step_ms=lambda area, count: 30.0)
    rig.model.goes_on = True
    rig.submit(8, seed=1)
    rig.run()
    assert rig.model.at_most == [3, 3, 2], "3 of 30 ms are within 100"
    rig = Rig(step_ms=lambda area, count: 30.0)
    rig.submit(3, seed=1, within_ms=110.0)
    rig.clock.pass_ms(30.0)
    rig.loop.tick()
    assert rig.model.at_most == [2], "of three steps: the deadline comes sooner"


def test_a_model_does_not_go_on_without_knowing_how_long_calls_take() -> None:
    rig = Rig(costs=CostTable())
    rig.model.goes_on = True
    rig.submit(5, seed=1)
    rig.run()
    assert rig.model.at_most == [1, 1, 1, 2], "known by three calls"


def test_a_model_does_not_go_on_where_others_wait() -> None:
    rig = Rig(step_ms=linear, max_images_in_flight=1)
    rig.submit(3, seed=1)
    rig.submit(3, seed=2)
    rig.run()
    assert rig.model.at_most == [1] * 3 + [3, 2, 1]
    rig = Rig(step_ms=linear, max_images_in_flight=2)
    for seed in (1, 2):
        rig.submit(3, seed=seed)
    rig.run()
    assert [len(call) for call in rig.model.calls] == [1] * 6, "this device gains nothing"
    assert rig.model.at_most == [1] * 3 + [3, 2, 1]


def test_who_comes_has_a_place_in_the_next_call() -> None:
    rig = Rig()
    rig.model.goes_on = True
    rig.submit(9, seed=1)

    def come() -> None:
        rig.model.after_call = lambda: None
        rig.submit(2, seed=2)

    rig.model.after_call = come
    rig.run()
    assert rig.model.calls == [[1], [2, 1], [2, 1], *[[1]] * 6]


def test_who_leaves_is_in_no_other_call() -> None:
    rig = Rig()
    rig.model.goes_on = True
    heard = rig.submit(9, seed=1)
    assert heard.job is not None
    rig.model.after_call = heard.job.cancel
    rig.run()
    assert rig.model.calls == [[1]]
    assert isinstance(heard.error, Cancelled)


def test_a_model_does_not_go_on_with_whom_a_worker_has_died_of() -> None:
    rig = Rig()
    rig.model.goes_on = True
    heard = rig.submit(4, seed=1)
    rig.model.dies_next = True
    rig.run()
    assert heard.is_finished and rig.model.at_most == [1] * 4


# Leaving ----------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_slot_before_the_next_step() -> None:
    rig = Rig(max_images_in_flight=1)
    first, second = rig.submit(50, seed=1), rig.submit(2, seed=2)
    rig.loop.tick()
    assert first.job is not None
    first.job.cancel()
    rig.run()
    assert isinstance(first.error, Cancelled) and second.is_finished
    assert rig.model.calls == [[1], [2], [2]]
    assert not rig.model.live


def test_a_call_that_fails_leaves_no_images_behind() -> None:
    rig = Rig(max_images_in_flight=2)
    rig.model.broken_seeds = {2}
    bad = rig.submit(seed=1, num_images=4)
    rig.run()
    assert isinstance(bad.error, RuntimeError)
    assert not rig.model.live and rig.loop.load == (0, 0)


# Workers that die -------------------------------------------------------------------------------


def test_what_was_in_flight_begins_again_and_is_told_once() -> None:
    rig = Rig()
    both = [rig.submit(4, seed=10), rig.submit(6, seed=20, num_images=2)]
    for _ in range(3):
        rig.loop.tick()
    rig.model.dies_next = True
    rig.model.polls_until_ready = 5
    rig.run()
    assert [sorted(heard.images) for heard in both] == [[0], [0, 1]]
    assert [heard.num_steps for heard in both] == [3 + 4, 2 * 3 + 2 * 6]
    assert both[1].images[1].image[0, 0, 0] == 21
    assert rig.model.life == 1 and not rig.model.live


def test_an_image_that_was_told_is_not_drawn_again() -> None:
    rig = Rig(max_images_in_flight=1)
    heard = rig.submit(2, seed=5, num_images=3)
    while len(heard.images) < 2:
        rig.loop.tick()
    rig.model.dies_next = True
    rig.run()
    assert heard.is_finished
    assert rig.model.calls == [[5]] * 2 + [[6]] * 2 + [[7]] * 2


@pytest.mark.parametrize("call", ["begin", "decode", "preview", "release"])
def test_a_worker_may_die_in_any_call(call: str) -> None:
    rig = Rig(max_images_in_flight=2)
    heard = [rig.submit(3, seed=seed, num_images=2, preview_every=2) for seed in (10, 20)]
    original = getattr(rig.model, call)

    def deadly(*arguments: object) -> object:
        setattr(rig.model, call, original)
        rig.model.dies_next = True
        return original(*arguments)

    setattr(rig.model, call, deadly)
    leaving = rig.submit(50, seed=30)
    for _ in range(12):
        rig.loop.tick()
    assert leaving.job is not None
    leaving.job.cancel()  # calls `release`
    rig.run()
    assert all(one.is_finished for one in heard) and isinstance(leaving.error, Cancelled)
    assert rig.model.life == 1 and not rig.model.live


def test_a_request_that_kills_workers_fails_alone() -> None:
    rig = Rig()
    rig.model.deadly_seeds = {66}
    good, deadly = [rig.submit(8, seed=seed) for seed in range(3)], rig.submit(8, seed=66)
    rig.run()
    assert isinstance(deadly.error, WorkerDied)
    assert all(heard.is_finished for heard in good)
    fatal = [call for call in rig.model.calls if 66 in call]
    assert len(fatal) == MAX_RESTARTS + 1
    assert all(call == [66] for call in fatal[1:]), "after the first time it takes nobody with it"


def test_while_there_is_no_worker_requests_can_leave() -> None:
    rig = Rig()
    cancelled, late = rig.submit(5), rig.submit(5, within_ms=1000.0)
    rig.loop.tick()
    rig.model.dies_next = True
    rig.model.polls_until_ready = 10**9
    rig.loop.tick()
    assert cancelled.job is not None
    cancelled.job.cancel()
    rig.clock.pass_ms(2000.0)
    rig.loop.tick()
    assert isinstance(cancelled.error, Cancelled) and isinstance(late.error, DeadlineExceeded)
    assert not rig.loop.has_work
