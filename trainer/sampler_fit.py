"""One sampler's table: fitted to what its scheduler did to the probes, and gated against it."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from engine.errors import OneWordError
from engine.samplers import COLUMNS, NUM_COLUMNS, SamplerTable, StepCoefficients, step
from trainer.scheduler_probe import (
    BASIS,
    CLOSED_LOOP,
    MAX_HISTORY,
    Column,
    Equations,
    Lanes,
    ProbeRow,
    Schedule,
    conversions,
    equations,
    nonlinear_model,
    solve,
)

# Closed-loop error of a table, relative to the largest latent of the row. Rounding in float64
# stays orders of magnitude below it; what must not pass is far above: float32 anywhere in the
# coefficients (1e-7), clipping, thresholding or a wrong history (1e-3 to 10).
GATE_TOLERANCE = 1e-8
# Residual of a row's fit, and of a warm row that stands in for a cold one.
FIT_TOLERANCE = 1e-10

Rows = Float64[np.ndarray, "rows columns"]


# The rows of a run that began midway, and how many of its first are not as in the warm table.
ColdRun = tuple[list[ProbeRow], int]


class SamplerRefused(OneWordError):
    """A scheduler that no table reproduces; the message names the sampler and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReport:
    """How a table was made, and how well it follows its scheduler."""

    scheduler: str  # class name in diffusers
    history: str  # what is kept of earlier steps, a key of `conversions`
    history_length: int  # K
    num_rows: int
    num_cold_rows: int
    max_error: float  # worst closed-loop error, relative
    refused_steps: list[int]  # step counts that the scheduler itself refuses


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsTable:
    """The part of a table that belongs to one number of steps."""

    init_sigma: float
    rows: Rows
    cold_rows: Rows
    cold_index: Int64[np.ndarray, "cold 3"]
    max_error: float


def tabulate(name: str, scheduler: Any, *, max_steps: int) -> tuple[SamplerTable, TableReport]:
    """Fit and gate the table of one scheduler for 1 to `max_steps` steps.

    Raises `SamplerRefused` if the scheduler is no linear table.
    """
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise SamplerRefused(
            f"sampler {name!r}: prediction_type is {scheduler.config.prediction_type!r}; "
            "tables are made for 'epsilon' and 'v_prediction'"
        )
    # What is not finite fails the fit and is refused by name.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array_wrap__")  # DEIS: numpy's log of a tensor
        largest = _largest_schedule(scheduler, max_steps)
        kind, length = _choose_history(name, scheduler, largest)
        parts = [_tabulate_steps(name, scheduler, n, kind, length) for n in range(1, max_steps + 1)]
    table = _join(name, scheduler.order, parts, length)
    return table, TableReport(
        scheduler=type(scheduler).__name__,
        history=kind,
        history_length=length,
        num_rows=len(table.rows),
        num_cold_rows=len(table.cold_rows),
        max_error=max(part.max_error for part in parts if part is not None),
        refused_steps=[n for n, part in enumerate(parts, start=1) if part is None],
    )


def _join(name: str, order: int, parts: Sequence[StepsTable | None], length: int) -> SamplerTable:
    """All step counts in one table; a refused one has no rows and no `init_sigma`."""
    made = [part for part in parts if part is not None]
    counts = [0 if part is None else len(part.rows) for part in parts]
    return SamplerTable(
        name=name,
        order=order,
        rows=np.concatenate([part.rows for part in made]),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        init_sigma=np.array([np.nan if part is None else part.init_sigma for part in parts]),
        cold_rows=np.concatenate([part.cold_rows for part in made]),
        cold_index=np.concatenate([part.cold_index for part in made]),
    )


def _largest_schedule(scheduler: Any, max_steps: int) -> Schedule:
    for num_inference_steps in range(max_steps, 1, -1):
        try:
            return Schedule(scheduler, num_inference_steps)
        except ValueError:
            continue
    return Schedule(scheduler, 1)


def _choose_history(name: str, scheduler: Any, schedule: Schedule) -> tuple[str, int]:
    """The simplest kind of history that explains a whole run, with the fewest entries."""
    run = list(schedule.run(0, np.random.default_rng(0)))
    kinds = conversions(schedule.levels, scheduler.config.prediction_type)
    best = np.inf
    for length in range(1, MAX_HISTORY + 1):
        for kind, (p, q) in kinds.items():
            _, residual = _solve(list(_equations(run, p, q, length)))
            if residual <= FIT_TOLERANCE:
                return kind, length
            best = min(best, residual)
    raise _refused(name, scheduler, schedule, f"no linear map fits its steps (residual {best:.1e})")


def _equations(run: Iterable[ProbeRow], p: Column, q: Column, length: int) -> Iterator[Equations]:
    history: tuple[Lanes, ...] = ()
    for row in run:
        history = (_converted(row, p, q), *history)[:length]
        yield equations(row, history, length)


def _converted(row: ProbeRow, p: Column, q: Column) -> Lanes:
    # A weight of 0 drops its term, as 0 * inf would not.
    terms = ((p[row.index], row.latents), (q[row.index], row.noise_pred))
    return sum((weight * value for weight, value in terms if weight != 0.0), np.zeros(()))


def _solve(rows: Sequence[Equations]) -> tuple[Rows, float]:
    """Coefficients and the worst residual; infinite where the equations cannot be solved."""
    try:
        coefficients, residuals = solve(rows)
    except np.linalg.LinAlgError:
        return np.zeros((len(rows), rows[0].design.shape[1])), np.inf
    worst = float(residuals.max())
    return coefficients, worst if np.isfinite(worst) else np.inf


def _refused(name: str, scheduler: Any, schedule: Schedule, symptom: str) -> SamplerRefused:
    config = scheduler.config
    if config.get("thresholding"):
        reason = "it thresholds (set thresholding to false in the scheduler config)"
    elif config.get("clip_sample"):
        reason = "it clips (set clip_sample to false in the scheduler config)"
    elif schedule.levels.k0.min() == 0.0 and config.prediction_type == "epsilon":
        reason = "the first timestep has no signal, from which epsilon cannot recover an image"
    else:
        reason = f"its step is not linear in the latents and {MAX_HISTORY} model outputs"
    return SamplerRefused(
        f"sampler {name!r} ({type(scheduler).__name__}), {schedule.num_inference_steps} steps: "
        f"{symptom}; {reason}; or leave {name!r} out of the names"
    )


def _tabulate_steps(
    name: str, scheduler: Any, num_inference_steps: int, kind: str, length: int
) -> StepsTable | None:
    """None if the scheduler itself refuses this number of steps."""
    try:
        schedule = Schedule(scheduler, num_inference_steps)
    except ValueError:
        return None
    fit = _StepsFit(name, scheduler, schedule, kind, length)
    rng = np.random.default_rng(num_inference_steps)
    warm_run = list(schedule.run(0, rng))
    warm = fit.solve([warm_run])
    warm_error = fit.gate(warm_run, warm)
    runs = fit.run_starts(warm, rng)
    cold, cold_error = fit.solve_starts(runs, warm)
    cold_index = [
        (num_inference_steps, run[0].index, row.index)
        for run, num_cold in runs
        for row in run[:num_cold]
    ]
    return StepsTable(
        init_sigma=schedule.init_sigma,
        rows=warm,
        cold_rows=cold,
        cold_index=np.array(cold_index, dtype=np.int64).reshape(-1, 3),
        max_error=max(warm_error, cold_error),
    )


class _StepsFit:
    """Fit and gate for one number of steps."""

    def __init__(
        self, name: str, scheduler: Any, schedule: Schedule, kind: str, length: int
    ) -> None:
        self._name = name
        self._scheduler = scheduler
        self._schedule = schedule
        self._length = length
        levels = schedule.levels
        kinds = conversions(levels, scheduler.config.prediction_type)
        self._p, self._q = kinds[kind]
        e, f = kinds["clean"]
        zeros = np.zeros_like(e)
        known = {"p": self._p, "q": self._q, "a": zeros, "c": zeros, "e": e, "f": f}
        known |= {key: getattr(levels, key) for key in ("timestep", "s", "k0", "k1")}
        columns = [known[key] for key in COLUMNS]
        self._known = np.stack([*columns, *[zeros] * length], axis=-1)

    def solve(self, runs: Sequence[Sequence[ProbeRow]]) -> Rows:
        """The table's rows for runs of the scheduler that each began without history."""
        indices = np.array([row.index for run in runs for row in run], dtype=np.int64)
        table = self._known[indices]
        if not len(table):
            return table
        unknowns = [row for run in runs for row in _equations(run, self._p, self._q, self._length)]
        coefficients, residual = _solve(unknowns)
        if not residual <= FIT_TOLERANCE:
            raise self._refused(f"residual {residual:.1e} exceeds {FIT_TOLERANCE}")
        table[:, COLUMNS.index("a")] = coefficients[:, 0]
        table[:, COLUMNS.index("c")] = coefficients[:, -1]
        table[:, NUM_COLUMNS:] = coefficients[:, 1:-1]
        return table

    def run_starts(self, warm: Rows, rng: np.random.Generator) -> list[ColdRun]:
        """Each start is followed until its rows are the warm ones; one of them to the end."""
        order = self._scheduler.order
        starts = range(order, order * self._schedule.num_inference_steps, order)
        to_end = starts[len(starts) // 2] if starts else None
        return [self._run_cold(start, warm, rng, to_end=start == to_end) for start in starts]

    def solve_starts(self, runs: Sequence[ColdRun], warm: Rows) -> tuple[Rows, float]:
        """The cold rows of all starts, and the worst closed-loop error."""
        rows = self.solve([run[:num_cold] for run, num_cold in runs])
        worst, done = 0.0, 0
        for run, num_cold in runs:
            cold = rows[done : done + num_cold]
            table = np.concatenate([cold, warm[run[0].index + num_cold :]])
            worst = max(worst, self.gate(run, table))
            done += num_cold
        return rows, worst

    def _run_cold(
        self, start: int, warm: Rows, rng: np.random.Generator, *, to_end: bool
    ) -> ColdRun:
        """Run from `start` until a row is as in the warm table, or to the end of the schedule."""
        run: list[ProbeRow] = []
        num_cold: int | None = None
        history: tuple[Lanes, ...] = ()
        for row in self._schedule.run(start, rng):
            run.append(row)
            if num_cold is None and _follows(row, history, warm[row.index]):
                num_cold = len(run) - 1
            if num_cold is not None and not to_end:
                break
            history = (_converted(row, self._p, self._q), *history)[: self._length]
        return run, len(run) if num_cold is None else num_cold

    def gate(self, run: Sequence[ProbeRow], table: Rows) -> float:
        """The closed-loop error, if it passes; the table may have more rows than the run."""
        self._check_draws(run, table)
        error = closed_loop_error(run, table)
        if not error <= GATE_TOLERANCE:
            raise self._refused(f"closed-loop error {error:.1e} exceeds {GATE_TOLERANCE}")
        return error

    def _check_draws(self, run: Sequence[ProbeRow], table: Rows) -> None:
        """A row must use the noise that the scheduler draws, or their generators part ways."""
        uses_noise = table[:, COLUMNS.index("c")] != 0.0
        for position, row in enumerate(run):
            # What is drawn after the last row that uses noise changes no image.
            wasted = not uses_noise[position] and uses_noise[position:].any()
            if row.draws > 1 or (row.draws and wasted):
                raise self._refused(f"row {row.index} draws noise that its step does not use")

    def _refused(self, symptom: str) -> SamplerRefused:
        return _refused(self._name, self._scheduler, self._schedule, symptom)


def _coefficients(row: Float64[np.ndarray, " columns"]) -> StepCoefficients:
    values = [float(value) for value in row.tolist()]
    known = dict(zip(COLUMNS, values, strict=False))
    return StepCoefficients(**known, b=tuple(values[NUM_COLUMNS:]))


def _follows(
    row: ProbeRow, history: Sequence[Lanes], table_row: Float64[np.ndarray, " columns"]
) -> bool:
    """Whether a row of the table says what the scheduler did."""
    coefficients = _coefficients(table_row)
    updated, _ = step(row.latents, row.noise_pred, history, row.noise, coefficients)
    error = np.abs(updated - row.updated)[BASIS].max()
    scale = max(np.abs(row.updated)[BASIS].max(), np.abs(row.latents)[BASIS].max())
    return bool(error <= FIT_TOLERANCE * scale)


def closed_loop_error(run: Sequence[ProbeRow], table: Rows) -> float:
    """The table against the scheduler, each feeding on its own latents; same model, same noise.

    Runs `engine.samplers.step` in float64. Relative to the largest latent of each row; the worst.
    """
    latents = run[0].latents[CLOSED_LOOP:]
    history: tuple[Lanes, ...] = ()
    worst = 0.0
    for row, values in zip(run, table, strict=False):
        coefficients = _coefficients(values)
        noise_pred = nonlinear_model(coefficients.s * latents, coefficients.timestep)
        noise = row.noise[CLOSED_LOOP:]
        latents, history = step(latents, noise_pred, history, noise, coefficients)
        expected = row.updated[CLOSED_LOOP:]
        error = float(np.abs(latents - expected).max() / np.abs(expected).max())
        worst = error if not error <= worst else worst  # keeps a NaN, which max() may drop
    return worst
