"""Graphs on a device that are fed from the host: text encoders, the encoder of initial images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.backends.device import (
    Array,
    Call,
    Device,
    DeviceArray,
    Program,
    lengths_of,
    output_arrays,
)
from engine.sessions import Feeds

_MAX_CALLS = 4  # of different shapes that are kept ready


@dataclass(frozen=True, slots=True)
class _Ready:
    """A call and its arrays."""

    inputs: dict[str, DeviceArray]
    outputs: dict[str, DeviceArray]
    call: Call


class DeviceSession:
    """A program as a `Session`: arrays in, arrays out."""

    def __init__(self, device: Device, program: Program, *, scale_factor: int) -> None:
        self._device, self._program = device, program
        self._scale_factor = scale_factor  # pixels per latent
        self._ready: dict[tuple[tuple[int, ...], ...], _Ready] = {}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the graph, in as many calls as its largest batch makes necessary."""
        count = len(next(iter(feeds.values())))
        most = self._program.largest("batch") or max(count, 1)
        parts = [
            self._run({name: values[start : start + most] for name, values in feeds.items()})
            for start in range(0, count, most)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        shapes = tuple(feeds[tensor.name].shape for tensor in self._program.spec.inputs)
        if shapes not in self._ready:
            if len(self._ready) >= _MAX_CALLS:
                del self._ready[next(iter(self._ready))]
            self._ready[shapes] = self._prepare(shapes)
        ready = self._ready[shapes]
        for name, array in ready.inputs.items():
            self._device.upload(array, np.asarray(feeds[name], array.dtype, order="C"))
        ready.call()
        return {name: self._device.download(array) for name, array in ready.outputs.items()}

    def _prepare(self, shapes: tuple[tuple[int, ...], ...]) -> _Ready:
        spec = self._program.spec
        inputs = {
            tensor.name: self._device.empty(shape, tensor.dtype)
            for tensor, shape in zip(spec.inputs, shapes, strict=True)
        }
        lengths = lengths_of(spec, {name: array.shape for name, array in inputs.items()})
        for side in ("height", "width"):  # of what the autoencoder enlarges or shrinks
            if side in lengths:
                lengths[f"image_{side}"] = lengths[side] * self._scale_factor
                lengths[f"latent_{side}"] = lengths[side] // self._scale_factor
        outputs = output_arrays(self._device, spec, lengths)
        return _Ready(inputs, outputs, self._program.bind(inputs, outputs))
