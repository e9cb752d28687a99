"""The cost table, the measurement that fills it, and how many images it lets join a call."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batching.config import BatcherConfig
from engine.batching.cost_measurement import measure_costs
from engine.batching.shared_calls import how_many_join
from engine.batching.step_costs import CallCosts, CostTable
from tests.batcher_toy import AREA, Clock, ToyModel, flat, linear, plan

# Floats that were scaled by an area and back: some roundings of 1e-16.
CLOSE = 1e-9


def test_between_measured_counts_costs_are_interpolated() -> None:
    costs = CallCosts(flat_beyond=True)
    for count, ms in ((2, 10.0), (4, 14.0), (8, 30.0)):
        costs.set(AREA, count, ms)
    predicted = [costs.ms(AREA, count) for count in (1, 2, 3, 4, 6, 8, 10)]
    # Below the least one no cheaper; beyond the last in the direction of the last two.
    assert predicted == pytest.approx([10.0, 10.0, 12.0, 14.0, 22.0, 30.0, 38.0], rel=CLOSE)


def test_with_one_count_known_larger_calls_are_tried_or_taken_as_proportional() -> None:
    optimist, pessimist = CallCosts(flat_beyond=True), CallCosts(flat_beyond=False)
    for costs in (optimist, pessimist):
        costs.set(AREA, 2, 10.0)
    assert optimist.ms(AREA, 8) == pytest.approx(10.0, rel=CLOSE)
    assert pessimist.ms(AREA, 8) == pytest.approx(40.0, rel=CLOSE)


def test_an_area_never_seen_costs_in_proportion_to_the_nearest() -> None:
    costs = CallCosts(flat_beyond=True)
    costs.set(64, 1, 1.0)
    costs.set(64 * 64, 1, 100.0)
    assert costs.ms(16, 1) == pytest.approx(0.25, rel=CLOSE)
    assert costs.ms(128 * 128, 1) == pytest.approx(400.0, rel=CLOSE)


def test_one_call_that_was_held_up_is_not_a_cost() -> None:
    costs = CallCosts(flat_beyond=True)
    costs.observe(AREA, 1, 5000.0)
    assert costs.ms(AREA, 1) is None
    costs.observe(AREA, 1, 2.0)
    costs.observe(AREA, 1, 2.0)
    assert costs.ms(AREA, 1) == pytest.approx(2.0, rel=CLOSE)
    costs.observe(AREA, 1, 7000.0)
    assert costs.ms(AREA, 1) == pytest.approx(2.0, rel=CLOSE)


def test_a_device_that_slows_down_is_followed() -> None:
    costs = CallCosts(flat_beyond=True)
    costs.set(AREA, 1, 2.0)
    for _ in range(3):
        costs.observe(AREA, 1, 6.0)
    assert costs.ms(AREA, 1) == pytest.approx(6.0, rel=CLOSE)


def test_sizes_that_callers_choose_do_not_make_the_table_grow() -> None:
    costs = CallCosts(flat_beyond=True)
    for width, height in itertools.product(range(8, 2049, 24), repeat=2):
        costs.observe(width * height, 1, 1.0)
    assert len(costs._times) <= 2 * 22 + 1  # half octaves from 2^6 to 2^22 pixels


def test_the_cost_of_an_image_is_that_of_full_calls() -> None:
    # 16 rows take twice what one takes: a row of a full call costs an eighth of one alone.
    table = CostTable.of({(AREA, 1): 8.0, (AREA, 16): 16.0}, {(AREA, 1): 5.0})
    assert table.image_us(area=AREA, rows=2, num_steps=10) == 1000 * (10 * 2 * 1 + 5)
    alone_ms = table.alone_ms(area=AREA, rows=1, num_steps=10)
    assert alone_ms == pytest.approx(10 * 8.0 + 5.0, rel=CLOSE)


def test_without_costs_work_still_counts_in_proportion() -> None:
    table = CostTable()
    small = table.image_us(area=1 << 20, rows=1, num_steps=10)
    assert table.image_us(area=1 << 20, rows=2, num_steps=40) == pytest.approx(8 * small, rel=0.1)
    assert not table.is_known(AREA)


# Measuring --------------------------------------------------------------------------------------


def measure(model: ToyModel, clock: Clock, **config: float) -> CostTable:
    settings = BatcherConfig(**{"max_batch_rows": 16, **config})  # type: ignore[arg-type]
    return measure_costs(model, plan(4, rows=1), settings, clock=clock)


def test_measuring_finds_what_calls_take() -> None:
    clock = Clock()
    model = ToyModel(clock, step_ms=lambda _, rows: 3.0 + 0.5 * rows, decode_ms=lambda *_: 7.0)
    table = measure(model, clock, cost_measurement_s=60.0)
    found = [table.steps.ms(AREA, rows) for rows in (1, 2, 3, 8, 12, 16)]
    assert found == pytest.approx([3.5, 4.0, 4.5, 7.0, 9.0, 11.0], rel=CLOSE)
    assert table.decodes.ms(AREA, 1) == pytest.approx(7.0, rel=CLOSE)
    assert not model.live, "images that nobody holds any more"


def test_measuring_ends_when_its_time_is_over() -> None:
    clock = Clock()
    model = ToyModel(clock, step_ms=lambda _, rows: 100.0 * rows, decode_ms=linear)
    started = clock.now
    table = measure(model, clock, cost_measurement_s=1.0)
    # 4 x 100 ms, then 200 ms calls: the one under way at the end is finished, no other begins.
    assert clock.now - started <= 1.0 + 0.2
    assert table.steps.ms(AREA, 2) == pytest.approx(200.0, rel=CLOSE)
    assert table.steps.ms(AREA, 16) == pytest.approx(1600.0, rel=CLOSE), "by the direction"
    assert not model.live


def test_measuring_a_slow_device_makes_one_call() -> None:
    clock = Clock()
    model = ToyModel(clock, step_ms=lambda _, rows: 60_000.0 * rows)
    table = measure(model, clock, cost_measurement_s=1.0)
    assert model.calls == [[0]]
    assert table.steps.ms(AREA, 1) == pytest.approx(60_000.0, rel=CLOSE)
    assert not model.live


def test_a_size_that_fails_ends_the_measurement() -> None:
    def step_ms(area: int, rows: int) -> float:
        if rows > 4:
            raise MemoryError
        return 1.0 * rows

    clock = Clock()
    model = ToyModel(clock, step_ms=step_ms)
    table = measure(model, clock, cost_measurement_s=60.0)
    assert table.steps.ms(AREA, 4) == pytest.approx(4.0, rel=CLOSE)
    assert [len(call) for call in model.calls[-2:]] == [4, 8]
    assert not model.live
    model.broken_seeds = {0}
    with pytest.raises(RuntimeError):
        measure(model, clock, cost_measurement_s=60.0)


@pytest.mark.parametrize(("max_rows", "sizes"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_the_largest_call_is_measured(max_rows: int, sizes: list[int]) -> None:
    clock = Clock()
    model = ToyModel(clock, step_ms=flat)
    measure(model, clock, max_batch_rows=max_rows, cost_measurement_s=60.0)
    assert sorted({len(call) for call in model.calls}) == sizes


# How many join ----------------------------------------------------------------------------------


def waiting(alone: Sequence[float], together: Sequence[float], num_behind: int, n: int) -> float:
    """Sum over all images of when they are served: n in a call, then the others one by one."""
    ends = [together[n - 1]] * n
    for ms in alone[n:]:
        ends.append(ends[-1] + ms)
    return sum(ends) + num_behind * ends[-1]


@settings(max_examples=200, deadline=None, database=None)
@given(
    alone=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    increments=st.lists(st.integers(0, 60), min_size=8, max_size=8),
    num_behind=st.integers(0, 70),
)
def test_as_many_join_as_make_the_sum_of_waiting_least(
    alone: list[int], increments: list[int], num_behind: int
) -> None:
    together = [float(sum(increments[:n])) + alone[0] for n in range(len(alone))]
    times = [float(ms) for ms in alone]
    sums = [waiting(times, together, num_behind, n) for n in range(1, len(alone) + 1)]
    # For one image the call is its own, whatever the table says of it.
    assert sums[how_many_join(times, together, num_behind) - 1] == min(sums)


@pytest.mark.parametrize("num_behind", [0, 5, 64])
def test_where_costs_are_linear_nobody_is_made_to_wait(num_behind: int) -> None:
    assert how_many_join([3.0] * 8, [3.0 * n for n in range(1, 9)], num_behind) == 1


@pytest.mark.parametrize("num_behind", [0, 5, 64])
def test_where_costs_are_flat_all_join(num_behind: int) -> None:
    assert how_many_join([3.0] * 8, [3.0] * 8, num_behind) == 8


def test_the_longer_the_queue_the_more_join() -> None:
    # Each further image costs 0.9 of a call of its own: a gain of a tenth.
    alone, together = [1.0] * 8, [1.0 + 0.9 * n for n in range(8)]
    joined = [how_many_join(alone, together, behind) for behind in (0, 10, 40, 200)]
    assert joined == sorted(joined) and joined[0] == 1 and joined[-1] == 8
