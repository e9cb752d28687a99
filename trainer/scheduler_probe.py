"""diffusers' schedulers as linear maps: run in double precision on probes, and the maps read off.

A linear map is known by what it does to a basis, so a scheduler is run on probe vectors that are
independent of each other (model outputs and noise are drawn afresh for every row) and each row's
coefficients are solved for. A second lane of the same run is closed-loop: its model outputs come
from a nonlinear function of the latents. It takes no part in the fit, so it can judge it: clipping
and thresholding are not linear, and only a run that feeds on its own results is sure to show it.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch.overrides import TorchFunctionMode

PROBE_SIZE = 16  # equations per row; there are never more than 2 + MAX_HISTORY unknowns
MAX_HISTORY = 6
LANES = 2
BASIS, CLOSED_LOOP = 0, 1  # the two lanes: batch entries to the scheduler, channels to the engine

Lanes = Float64[np.ndarray, "lanes probes 1"]
Column = Float64[np.ndarray, " rows"]


class DoublePrecision(TorchFunctionMode):
    """Keeps a scheduler in float64 where it casts to float32, and hands it the noise it draws."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.draws = 0
        self._noise = noise

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.randn:
            self.draws += 1
            return self._noise
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            args = tuple(_widen(value) for value in args)
            kwargs = {key: _widen(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """What the scheduler was given in one row, and what it made of it."""

    index: int
    latents: Lanes
    noise_pred: Lanes
    noise: Lanes
    updated: Lanes
    draws: int  # how many noise tensors the scheduler drew


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Where each row of a schedule stands: the columns that need no fit (see engine.samplers)."""

    timestep: Column
    s: Column
    k0: Column
    k1: Column


def conversions(levels: Levels, prediction_type: str) -> dict[str, tuple[Column, Column]]:
    """(p, q) of each kind of history `h = p x + q m`.

    "raw" is the model output itself, "clean" the predicted clean latents, "noise" the predicted
    noise (Salimans and Ho 2022, appendix D), for latents `x = k0 y + k1 z` of any scale.
    """
    norm = np.hypot(levels.k0, levels.k1)
    alpha, sigma = levels.k0 / norm, levels.k1 / norm
    zeros, ones = np.zeros_like(norm), np.ones_like(norm)
    if prediction_type == "v_prediction":
        clean, noise = (alpha / norm, -sigma), (sigma / norm, alpha)
    else:
        clean, noise = (1 / levels.k0, -sigma / alpha), (zeros, ones)
    return {"raw": (zeros, ones), "clean": clean, "noise": noise}


class Schedule:
    """A scheduler set to a number of steps, in float64, that can be run from any of its rows."""

    def __init__(self, scheduler: Any, num_inference_steps: int) -> None:
        """Raises ValueError for a number of steps that the scheduler refuses or gets wrong."""
        scheduler.set_timesteps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._scheduler = _in_double_precision(scheduler)
        self._fresh = dict(vars(self._scheduler))
        self._timesteps: list[torch.Tensor] = list(self._scheduler.timesteps)
        # "trailing" counts down in floating point, and for some numbers (61 of 1000) once too
        # often: DDIM would then end on the noisiest of all levels, alphas_cumprod[-1].
        if float(min(self._timesteps)) < 0:
            raise ValueError(f"{num_inference_steps} steps include a timestep below 0")
        # Without a generator to draw from, step needs no watching, and runs in half the time.
        self._may_draw = "generator" in inspect.signature(scheduler.step).parameters
        self.init_sigma = float(self._scheduler.init_noise_sigma)
        self.levels = self._read_levels()

    def __len__(self) -> int:
        return len(self._timesteps)

    def run(self, first_row: int, rng: np.random.Generator) -> Iterator[ProbeRow]:
        """Run from `first_row` as diffusers' image-to-image does: begin index set, no history."""
        self._restart(first_row)
        scale = np.hypot(self.levels.k0[first_row], self.levels.k1[first_row])
        latents = scale * _normal(rng)
        for index in range(first_row, len(self)):
            noise_pred, noise = _normal(rng), _normal(rng)
            noise_pred[CLOSED_LOOP] = nonlinear_model(
                self.levels.s[index] * latents[CLOSED_LOOP], self.levels.timestep[index]
            )
            updated, draws = self._step(index, latents, noise_pred, noise)
            yield ProbeRow(
                index=index,
                latents=latents,
                noise_pred=noise_pred,
                noise=noise,
                updated=updated,
                draws=draws,
            )
            latents = updated

    def _step(
        self, index: int, latents: Lanes, noise_pred: Lanes, noise: Lanes
    ) -> tuple[Lanes, int]:
        mode = DoublePrecision(_to_torch(noise))
        with mode if self._may_draw else contextlib.nullcontext():
            updated = self._scheduler.step(
                _to_torch(noise_pred),
                self._timesteps[index],
                _to_torch(latents),
                return_dict=False,
            )[0]
        return updated.numpy()[..., 0], mode.draws

    def _restart(self, first_row: int) -> None:
        """As after `set_timesteps`, which is too slow to call again for each start."""
        state = vars(self._scheduler)
        state.clear()
        state.update({key: list(v) if isinstance(v, list) else v for key, v in self._fresh.items()})
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(first_row)
        # Set by scale_model_input in a pipeline; without it some schedulers warn in every step.
        self._scheduler.is_scale_input_called = True

    def _read_levels(self) -> Levels:
        rows = [self._level(index) for index in range(len(self))]
        timestep, s, k0, k1 = np.array(rows, dtype=np.float64).T
        return Levels(timestep=timestep, s=s, k0=k0, k1=k1)

    def _level(self, index: int) -> tuple[float, float, float, float]:
        self._restart(index)
        timestep = self._timesteps[index]
        # The begin index is set, so add_noise does not have to guess among equal timesteps.
        k0, k1 = self._scheduler.add_noise(_UNIT_IMAGE, _UNIT_NOISE, timestep[None])[0].tolist()
        s = float(self._scheduler.scale_model_input(_UNIT_IMAGE[0, 0], timestep))
        return float(timestep), s, k0, k1


_UNIT_IMAGE = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
_UNIT_NOISE = torch.tensor([[0.0, 1.0]], dtype=torch.float64)


def nonlinear_model(
    model_input: Float64[np.ndarray, "..."], timestep: float
) -> Float64[np.ndarray, "..."]:
    """Stands for the denoiser in closed loop.

    Its slope is 1 at most, so that a hundred steps do not amplify rounding into an error.
    """
    return np.sin(model_input + 0.01 * timestep) + 0.5


def _in_double_precision(scheduler: Any) -> Any:
    """A copy whose constants keep their float32 values but are computed with in float64."""
    double = copy.copy(scheduler)
    for key, value in vars(double).items():
        # Timesteps are only looked up and compared: they stay what the pipeline hands over.
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "timesteps":
            setattr(double, key, value.double())
    if hasattr(double, "get_lms_coefficient"):
        # LMS integrates polynomials numerically, one tensor operation at a time: the same on
        # plain floats, and once for all starts, takes a hundredth of the time.
        on_floats = copy.copy(double)
        on_floats.sigmas = double.sigmas.tolist()
        double.get_lms_coefficient = functools.cache(on_floats.get_lms_coefficient)
    return double


def _normal(rng: np.random.Generator) -> Lanes:
    return rng.standard_normal((LANES, PROBE_SIZE, 1))


def _to_torch(array: Lanes) -> torch.Tensor:
    return torch.from_numpy(array[..., None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Equations:
    """`design @ coefficients = updated` for one row, in the unknowns a, b_0 ... b_{K-1}, c."""

    design: Float64[np.ndarray, "probes unknowns"]
    present: Bool[np.ndarray, " unknowns"]  # an absent one has coefficient 0
    updated: Float64[np.ndarray, " probes"]


# Arbitrary columns that keep the equations regular where history is still short. The seed must not
# be that of a run, whose vectors they would repeat.
_FILLER = np.random.default_rng(2**32).standard_normal((MAX_HISTORY, LANES, PROBE_SIZE, 1))


def equations(row: ProbeRow, history: Sequence[Lanes], length: int) -> Equations:
    """The equations of one row; `history` is h_0, h_1, ... and `length` is K."""
    columns = [row.latents, *history[:length]]
    missing = length + 1 - len(columns)
    columns += [*_FILLER[:missing], row.noise]
    present = np.ones(length + 2, dtype=bool)
    present[length + 1 - missing : length + 1] = False
    present[-1] = row.draws > 0
    return Equations(
        design=np.stack([column[BASIS, :, 0] for column in columns], axis=-1),
        present=present,
        updated=row.updated[BASIS, :, 0],
    )


# A coefficient whose share of the result is below this is rounding of one that is exactly 0.
_NEGLIGIBLE = 1e-13


def solve(
    rows: Sequence[Equations],
) -> tuple[Float64[np.ndarray, "rows unknowns"], Float64[np.ndarray, " rows"]]:
    """Least squares for many rows at once: coefficients, and residuals relative to the terms."""
    design = np.stack([row.design for row in rows])
    updated = np.stack([row.updated for row in rows])
    present = np.stack([row.present for row in rows])
    scale = np.abs(design).max(axis=1)
    q, r = np.linalg.qr(design / scale[:, None])
    solution = np.linalg.solve(r, np.einsum("rpu,rp->ru", q, updated)[..., None])[..., 0]
    magnitude = np.maximum(np.abs(solution).max(axis=1), np.abs(updated).max(axis=1))
    solution[~present | (np.abs(solution) < _NEGLIGIBLE * magnitude[:, None])] = 0.0
    coefficients = solution / scale
    residual = np.abs(np.einsum("rpu,ru->rp", design, coefficients) - updated).max(axis=1)
    return coefficients, residual / magnitude
