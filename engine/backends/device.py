"""What the rest of this package needs of a device: memory, order, and graphs bound to addresses.

Everything enqueued happens in the order in which it was enqueued. Implementations: CUDA's runtime
(`cuda_device`), and in the tests the host's memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.bundle import ComponentSpec, TensorSpec

Array = npt.NDArray[Any]
ALIGNMENT = 256  # bytes; what TensorRT asks of every address it is given


@dataclass(frozen=True, slots=True, eq=False)
class DeviceArray:
    """A dense tensor in device memory; `owner` keeps that memory while this or a part lives."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def first(self, count: int) -> "DeviceArray":
        """Its first `count` entries along the first axis."""
        assert 0 <= count <= self.shape[0]
        return DeviceArray(self.address, (count, *self.shape[1:]), self.dtype, self.owner)

    def part(self, *index: int) -> "DeviceArray":
        """Entry `index`, along as many axes as there are numbers."""
        place = 0
        for length, number in zip(self.shape, index, strict=False):
            assert 0 <= number < length
            place = place * length + number
        rest = self.shape[len(index) :]
        offset = place * math.prod(rest) * self.dtype.itemsize
        return DeviceArray(self.address + offset, rest, self.dtype, self.owner)

    def view(self, offset: int, shape: Sequence[int], dtype: Any) -> "DeviceArray":
        """A tensor `offset` bytes into this one."""
        view = DeviceArray(self.address + offset, tuple(shape), np.dtype(dtype), self.owner)
        assert offset + view.nbytes <= self.nbytes
        return view


@runtime_checkable
class Call(Protocol):
    """Work that is enqueued by calling it, on arrays that were chosen before."""

    def __call__(self) -> None: ...


@runtime_checkable
class Mark(Protocol):
    """A place in the order of things."""

    def wait(self) -> None:
        """Return when everything that was enqueued before it is done."""
        ...


@runtime_checkable
class Device(Protocol):
    """Memory of a device, and the order in which it works. For one thread at a time."""

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """New memory, zero in every byte and aligned to `ALIGNMENT`.

        Raises `ProviderUnavailable` where there is no room.
        """
        ...

    def upload(self, to: DeviceArray, values: Array) -> None:
        """Copy from the host; `values` may be changed as soon as this returns."""
        ...

    def download(self, source: DeviceArray) -> Array:
        """Wait for everything before, and copy to the host."""
        ...

    def copy(self, to: DeviceArray, source: DeviceArray) -> None:
        """Copy inside the device."""
        ...

    def mark(self) -> Mark: ...

    def record(self, calls: Sequence[Call]) -> Call:
        """Several calls as one, which the device may begin without the host in between."""
        ...


@runtime_checkable
class Program(Protocol):
    """A loaded graph."""

    @property
    def spec(self) -> ComponentSpec: ...

    def largest(self, axis: str) -> int | None:
        """The largest length that it takes of a named axis; None: any."""
        ...

    def takes(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether it takes inputs of these shapes."""
        ...

    @property
    def limits(self) -> str:
        """What it takes and how it could take more, in words."""
        ...

    def bind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Call:
        """Fix the arrays that calls work on."""
        ...


def run_in_order(calls: Sequence[Call]) -> Call:
    """`Device.record` where there is nothing to record."""

    def run() -> None:
        for call in calls:
            call()

    return run


def lengths_of(spec: ComponentSpec, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The lengths of the named axes of a graph's inputs."""
    return {
        axis: length
        for tensor in spec.inputs
        for axis, length in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(axis, str)
    }


def shapes_of(tensors: Sequence[TensorSpec], lengths: Mapping[str, int]) -> dict[str, list[int]]:
    """Shapes of inputs or outputs whose named axes have these lengths."""
    return {
        tensor.name: [lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        for tensor in tensors
    }


def output_arrays(
    device: Device, spec: ComponentSpec, lengths: Mapping[str, int]
) -> dict[str, DeviceArray]:
    """Memory for the outputs of a graph whose axes have these lengths."""
    shapes = shapes_of(spec.outputs, lengths)
    return {tensor.name: device.empty(shapes[tensor.name], tensor.dtype) for tensor in spec.outputs}
