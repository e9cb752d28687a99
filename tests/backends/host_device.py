"""The host's memory as a device, so that the code of devices runs where there is none."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.backends.device import ALIGNMENT, Array, Call, DeviceArray, run_in_order


class HostDevice:
    """Everything is done when it returns, so that there is nothing to wait for."""

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        array = DeviceArray(0, tuple(shape), np.dtype(dtype), None)
        memory = np.zeros(array.nbytes + ALIGNMENT, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        return DeviceArray(address, array.shape, array.dtype, memory)

    def upload(self, to: DeviceArray, values: Array) -> None:
        assert values.dtype == to.dtype and values.shape == to.shape
        host_view(to)[...] = values

    def download(self, source: DeviceArray) -> Array:
        return host_view(source).copy()

    def copy(self, to: DeviceArray, source: DeviceArray) -> None:
        assert source.dtype == to.dtype and source.shape == to.shape
        host_view(to)[...] = host_view(source)

    def mark(self) -> "_Done":
        return _Done()

    def record(self, calls: Sequence[Call]) -> Call:
        return run_in_order(calls)


class _Done:
    def wait(self) -> None:
        """Nothing is ever under way."""


def host_view(array: DeviceArray) -> Array:
    """A tensor in the host's memory as numpy sees it, without a copy."""
    content = (ctypes.c_byte * array.nbytes).from_address(array.address)
    return np.frombuffer(memoryview(content), array.dtype).reshape(array.shape)
