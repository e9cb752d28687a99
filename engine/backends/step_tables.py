"""The numbers of a call, in one block on the host and one on the device: one small copy a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.backends.device import ALIGNMENT, Device, DeviceArray
from engine.backends.step_graphs import COLUMNS
from engine.plans.profiles import ROWS_PER_IMAGE
from engine.samplers import Latents, StepCoefficients


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStep:
    """One image of a call: where it is, and the numbers of this step."""

    slot: int
    weights: Sequence[float]  # of its rows in this call
    first_row: int = 0  # of those that the slot keeps: this one and those after it take part
    row: StepCoefficients
    noise: Latents | None  # where the row is stochastic


class StepTables:
    """Room for the numbers of `rows` rows and `slots` slots."""

    def __init__(self, device: Device, *, rows: int, slots: int, history: int) -> None:
        layout = {
            "timestep": ((rows,), np.float32),
            "scale": ((rows,), np.float32),
            "row_slot": ((rows,), np.int32),
            "row_prompt": ((rows,), np.int32),
            "row_index": ((slots, ROWS_PER_IMAGE), np.int32),
            "coefficients": ((slots, len(COLUMNS) + history + 1), np.float32),
        }
        places, end = dict[str, int](), 0
        for name, (shape, dtype) in layout.items():
            places[name] = end
            nbytes = math.prod(shape) * np.dtype(dtype).itemsize
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._device = device
        self._host = np.zeros(end, np.uint8)
        self._block = device.empty([end], np.uint8)
        self._values = {
            name: np.ndarray(shape, dtype, self._host.data, places[name])
            for name, (shape, dtype) in layout.items()
        }
        self._arrays = {
            name: self._block.view(places[name], shape, dtype)
            for name, (shape, dtype) in layout.items()
        }

    def array(self, name: str, rows: int | None = None) -> DeviceArray:
        """One table on the device; of those that have a row for each row, the first `rows`."""
        array = self._arrays[name]
        return array if rows is None else array.first(rows)

    def upload(self, images: Sequence[SlotStep]) -> None:
        """Tell the device who takes part in a call, and with what numbers."""
        values = self._values
        values["coefficients"][:] = 0.0  # whoever is not named is not active
        values["row_index"][:] = 0
        row = 0
        for image in images:
            count = len(image.weights)
            span = slice(row, row + count)
            values["timestep"][span] = image.row.timestep
            values["scale"][span] = image.row.s
            values["row_slot"][span] = image.slot
            values["row_prompt"][span] = (
                ROWS_PER_IMAGE * image.slot + image.first_row + np.arange(count)
            )
            # An image of one row names it twice, the second time with a weight of 0.
            values["row_index"][image.slot] = row + np.minimum(range(ROWS_PER_IMAGE), count - 1)
            numbers = [1.0, *image.weights, *[0.0] * (ROWS_PER_IMAGE - count)]
            numbers += [getattr(image.row, name) for name in "pqacef"]
            table = values["coefficients"][image.slot]
            table[: len(COLUMNS)] = numbers
            table[len(COLUMNS) :][: len(image.row.b)] = image.row.b
            row += count
        self._device.upload(self._block, self._host)
