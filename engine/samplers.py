"""Samplers as tables: each step is linear in the latents, the model output, history and noise.

With `h0 = p x + q m` (x: latents, m: the guided model output) one step is

    x' = a x + sum_k b_k h_k + c z          model input = s x          first latents = init_sigma z

where `h_1, h_2, ...` are the `h0` of earlier steps and z is standard normal noise. The coefficients
are read off diffusers' schedulers when a bundle is built (trainer/sampler_tables.py); nothing here
knows the name of a sampler, the prediction type or guidance: they are numbers by then.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, Int64
from safetensors import safe_open

from engine.errors import BundleError, InvalidRequest

# The columns of a table before the history weights b_0, b_1, ...
COLUMNS = ("timestep", "s", "p", "q", "a", "c", "k0", "k1", "e", "f")
NUM_COLUMNS = len(COLUMNS)
MAX_INFERENCE_STEPS = 100
KEPT_TRAJECTORIES = 16  # of a sampler: a megabyte if all have 100 steps
FORMAT = "oneword-samplers/1"

# float32 in service; float64 when a table is checked against its scheduler.
Latents = Float[np.ndarray, "channels height width"]


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """One denoiser call and the update that follows it, as plain numbers."""

    timestep: float  # what the denoiser is told
    s: float  # model input = s x
    p: float  # h0 = p x + q m
    q: float
    a: float  # x' = a x + sum_k b_k h_k + c z
    c: float
    k0: float  # an image known to be y stands here at k0 y + k1 z
    k1: float
    e: float  # predicted clean latents = e x + f m
    f: float
    b: tuple[float, ...]  # b_0 (this step's h) ... b_{K-1}


def step(
    latents: Latents,
    noise_pred: Latents,
    history: Sequence[Latents],
    noise: Latents | None,
    row: StepCoefficients,
) -> tuple[Latents, tuple[Latents, ...]]:
    """One sampler step; returns the new latents and the history for the next one, newest first.

    `noise` may be None where `row.c` is 0. History beyond `len(row.b) - 1` entries is dropped.
    """
    converted = row.p * latents + row.q * noise_pred
    available = (converted, *history)
    updated = row.a * latents
    for weight, entry in zip(row.b, available, strict=False):
        if weight != 0.0:
            updated += weight * entry
    if row.c != 0.0:
        assert noise is not None, "a stochastic row needs noise"
        updated += row.c * noise
    return updated, available[: max(len(row.b) - 1, 0)]


def predict_clean(latents: Latents, noise_pred: Latents, row: StepCoefficients) -> Latents:
    """The clean latents that the model expects at this step: what a preview shows."""
    return row.e * latents + row.f * noise_pred


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The rows of one image from its first to its last denoiser call."""

    rows: tuple[StepCoefficients, ...]
    init_sigma: float  # scale of the first latents when they are pure noise


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTable:
    """All trajectories of one sampler, for 1 to `MAX_INFERENCE_STEPS` steps.

    `rows[offsets[n - 1]:offsets[n]]` are the rows of n steps. A trajectory that starts at row r of
    them (image-to-image) has no history yet: its first rows are the `cold_rows` whose `cold_index`
    is (n, r, row), where they differ from the warm ones. A number of steps that the scheduler
    cannot do has no rows, and NaN as its `init_sigma`.
    """

    name: str
    order: int  # rows per step: a start is a multiple of it
    rows: Float64[np.ndarray, "rows columns"]
    offsets: Int64[np.ndarray, " steps_plus_1"]
    init_sigma: Float64[np.ndarray, " steps"]
    cold_rows: Float64[np.ndarray, "cold columns"]
    cold_index: Int64[np.ndarray, "cold 3"]  # sorted by (n, start, row)
    _kept: dict[tuple[int, int], Trajectory] = field(
        default_factory=dict[tuple[int, int], Trajectory], init=False, repr=False
    )

    def trajectory(self, num_inference_steps: int, strength: float = 1.0) -> Trajectory:
        """The rows of `num_inference_steps` steps, of which image-to-image runs the last part.

        `strength` in (0, 1] is the share of the schedule that is run, as in diffusers'
        image-to-image pipelines: `int(num_inference_steps * strength)` steps, at least one.
        """
        if not 1 <= num_inference_steps <= len(self.init_sigma):
            raise InvalidRequest(
                f"num_inference_steps must be between 1 and {len(self.init_sigma)}, "
                f"got {num_inference_steps}",
                field="num_inference_steps",
            )
        if np.isnan(self.init_sigma[num_inference_steps - 1]):
            supported = np.flatnonzero(~np.isnan(self.init_sigma)) + 1
            nearest = int(supported[np.abs(supported - num_inference_steps).argmin()])
            raise InvalidRequest(
                f"{self.name} has no schedule of {num_inference_steps} steps for this model (it "
                f"goes up to {supported[-1]}); the nearest it has is {nearest}",
                field="num_inference_steps",
            )
        if not 0.0 < strength <= 1.0:
            raise InvalidRequest(
                f"strength must be greater than 0 and at most 1, got {strength}", field="strength"
            )
        steps_to_run = max(min(int(num_inference_steps * strength), num_inference_steps), 1)
        key = (num_inference_steps, (num_inference_steps - steps_to_run) * self.order)
        # From any thread: each of these is done in one piece.
        trajectory = self._kept.get(key)
        if trajectory is None:
            if len(self._kept) >= KEPT_TRAJECTORIES:
                self._kept.clear()
            trajectory = self._kept[key] = self._read(*key)
        return trajectory

    def _read(self, num_inference_steps: int, start: int) -> Trajectory:
        first = int(self.offsets[num_inference_steps - 1])
        last = int(self.offsets[num_inference_steps])
        table = self.rows[first + start : last]
        if start:
            table = self._with_cold_rows(table.copy(), num_inference_steps, start)
        return Trajectory(
            rows=tuple(_coefficients(row) for row in table.tolist()),
            init_sigma=float(self.init_sigma[num_inference_steps - 1]),
        )

    def _with_cold_rows(
        self, table: Float64[np.ndarray, "rows columns"], num_inference_steps: int, start: int
    ) -> Float64[np.ndarray, "rows columns"]:
        begin = int(np.searchsorted(self.cold_index[:, 0], num_inference_steps, side="left"))
        end = int(np.searchsorted(self.cold_index[:, 0], num_inference_steps, side="right"))
        for offset in range(begin, end):
            if self.cold_index[offset, 1] == start:
                table[self.cold_index[offset, 2] - start] = self.cold_rows[offset]
        return table


def _coefficients(values: list[float]) -> StepCoefficients:
    named = dict(zip(COLUMNS, values, strict=False))
    return StepCoefficients(**named, b=tuple(values[NUM_COLUMNS:]))


def read_sampler_tables(path: Path) -> dict[str, SamplerTable]:
    """Read `samplers.safetensors` of a bundle; the file's own hash is checked by the bundle."""
    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise BundleError(
                f"{path} has format {metadata.get('format')!r}, this version reads {FORMAT!r}; "
                "build the bundle again"
            )
        orders: dict[str, int] = json.loads(metadata["orders"])
        return {
            name: SamplerTable(
                name=name,
                order=order,
                **{
                    key: file.get_tensor(f"{name}/{key}")
                    for key in ("rows", "offsets", "init_sigma", "cold_rows", "cold_index")
                },
            )
            for name, order in orders.items()
        }
