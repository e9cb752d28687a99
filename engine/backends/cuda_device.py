"""An NVIDIA GPU through CUDA's runtime; alone in importing cuda-bindings.

One stream does everything, so that order needs no more than the order of calls. Not executed by the
project's tests, which run on machines without a GPU, but for what the library says there.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.backends.device import Array, Call, DeviceArray, run_in_order
from engine.errors import ProviderUnavailable, WorkerDied

_NO_DRIVER = (35, 100, 803)  # insufficient driver, no device, driver and library do not match
_OUT_OF_MEMORY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What is known of a GPU without using it."""

    name: str
    capability: str  # "sm89"
    memory_bytes: int
    driver_version: int  # of CUDA that the driver supports: 13000 is 13.0


def import_cuda() -> Any:
    """`cuda.bindings.runtime`, or `ProviderUnavailable` that says how to get it."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError, RuntimeError) as error:
        raise ProviderUnavailable(
            f"cuda-bindings is not installed or cannot be loaded ({error}); it comes with "
            "`pip install oneword[gpu]`, oneword[rtx] and oneword[tensorrt]"
        ) from error


def find_gpu(index: int = 0) -> Gpu:
    """The GPU that backends use; raises `ProviderUnavailable` where there is none."""
    cuda = import_cuda()
    (count,) = checked(cuda, "find a GPU", cuda.cudaGetDeviceCount())
    if index >= count:
        raise ProviderUnavailable(f"this machine has {count} NVIDIA GPUs; one is needed")
    (properties,) = checked(cuda, "ask the GPU", cuda.cudaGetDeviceProperties(index))
    (driver,) = checked(cuda, "ask the driver", cuda.cudaDriverGetVersion())
    name = properties.name
    return Gpu(
        name=name.decode(errors="replace") if isinstance(name, bytes) else str(name),
        capability=f"sm{properties.major}{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
        driver_version=int(driver),
    )


def checked(cuda: Any, action: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of CUDA's returns beside its status; raises if that is not success."""
    status, *values = answer
    if int(status) == 0:
        return tuple(values)
    _, text = cuda.cudaGetErrorString(status)
    words = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    message = f"CUDA cannot {action}: {words} ({int(status)})"
    if int(status) in _NO_DRIVER:
        raise ProviderUnavailable(
            f"{message}; this backend needs an NVIDIA GPU and a driver for CUDA 13 (580 or newer)"
        )
    if int(status) == _OUT_OF_MEMORY:
        raise ProviderUnavailable(
            f"{message}; lower max_batch_rows or max_images_in_flight, or use a smaller bucket"
        )
    raise WorkerDied(f"{message}; the GPU's state is lost, the process must be started again")


class CudaDevice:
    """The first GPU that the process sees."""

    def __init__(self, *, records: bool) -> None:
        """`records`: whether calls that go together become CUDA graphs here, and not elsewhere."""
        self.gpu = find_gpu()
        self._records = records
        self._cuda = import_cuda()
        self._do("choose the GPU", self._cuda.cudaSetDevice, 0)
        flags = self._cuda.cudaStreamNonBlocking
        (self._stream,) = self._do("make a stream", self._cuda.cudaStreamCreateWithFlags, flags)

    @property
    def stream(self) -> int:
        """The stream as a number, as libraries take it."""
        return int(self._stream)

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        array = DeviceArray(0, tuple(shape), np.dtype(dtype), None)
        memory = self.allocate(array.nbytes)
        zero = (memory.address, 0, memory.nbytes, self._stream)
        self._do("clear memory", self._cuda.cudaMemsetAsync, *zero)
        return DeviceArray(memory.address, array.shape, array.dtype, memory)

    def allocate(self, nbytes: int) -> "CudaMemory":
        """Memory as it comes; CUDA aligns to 256 bytes at least."""
        size = max(nbytes, 1)
        (address,) = self._do(f"allocate {size} bytes", self._cuda.cudaMalloc, size)
        return CudaMemory(self._cuda, int(address), size)

    def upload(self, to: DeviceArray, values: Array) -> None:
        assert values.dtype == to.dtype and values.shape == to.shape
        # From pageable memory: CUDA has its own copy of it when this returns (CUDA runtime API,
        # "API synchronization behavior"), so the caller may fill it again at once.
        source = np.ascontiguousarray(values)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy("send to the GPU", to.address, source.ctypes.data, to.nbytes, kind)

    def download(self, source: DeviceArray) -> Array:
        values = np.empty(source.shape, source.dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy("fetch from the GPU", values.ctypes.data, source.address, source.nbytes, kind)
        self.synchronize()
        return values

    def copy(self, to: DeviceArray, source: DeviceArray) -> None:
        assert source.nbytes == to.nbytes
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy("copy on the GPU", to.address, source.address, to.nbytes, kind)

    def mark(self) -> "CudaMark":
        return CudaMark(self)

    def synchronize(self) -> None:
        self._do("work", self._cuda.cudaStreamSynchronize, self._stream)

    def record(self, calls: Sequence[Call]) -> Call:
        """A CUDA graph, captured at the second time: the first sets up what may not be captured."""
        return _Recorded(self, calls) if self._records else run_in_order(calls)

    def capture(self, calls: Sequence[Call]) -> "CudaGraph":
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("begin a graph", cuda.cudaStreamBeginCapture, self._stream, mode)
        try:
            for call in calls:
                call()
        finally:  # a capture that is not ended would hold the stream
            (graph,) = self._do("end a graph", cuda.cudaStreamEndCapture, self._stream)
        return CudaGraph(self, graph, calls)

    def _copy(self, action: str, to: int, source: int, nbytes: int, kind: Any) -> None:
        self._do(action, self._cuda.cudaMemcpyAsync, to, source, nbytes, kind, self._stream)

    def _do(self, action: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        return checked(self._cuda, action, function(*arguments))


class CudaMemory:
    """A block of the GPU's memory, given back with its last owner."""

    def __init__(self, cuda: Any, address: int, nbytes: int) -> None:
        self._cuda = cuda
        self.address, self.nbytes = address, nbytes

    def __del__(self) -> None:
        self._cuda.cudaFree(self.address)  # waits until the GPU needs it no more


class CudaMark:
    """A place in the stream."""

    def __init__(self, device: CudaDevice) -> None:
        self._device, cuda = device, device._cuda
        flags = cuda.cudaEventDisableTiming | cuda.cudaEventBlockingSync
        (self._event,) = device._do("make a mark", cuda.cudaEventCreateWithFlags, flags)
        device._do("set a mark", cuda.cudaEventRecord, self._event, device._stream)

    def wait(self) -> None:
        self._device._do("work", self._device._cuda.cudaEventSynchronize, self._event)

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._device._cuda.cudaEventDestroy(self._event)


class CudaGraph:
    """Calls that were captured; what they work on is kept with it."""

    def __init__(self, device: CudaDevice, graph: Any, keep: object) -> None:
        self._device, self._keep, cuda = device, keep, device._cuda
        (self._graph,) = device._do("make a graph", cuda.cudaGraphInstantiate, graph, 0)
        device._do("let go of a graph", cuda.cudaGraphDestroy, graph)

    def launch(self) -> None:
        cuda = self._device._cuda
        self._device._do("start a graph", cuda.cudaGraphLaunch, self._graph, self._device._stream)

    def __del__(self) -> None:
        if hasattr(self, "_graph"):
            self._device._cuda.cudaGraphExecDestroy(self._graph)


class _Recorded:
    """Runs its calls one by one the first time, and as one graph from then on."""

    def __init__(self, device: CudaDevice, calls: Sequence[Call]) -> None:
        self._device, self._calls = device, tuple(calls)
        self._runs = 0
        self._graph: CudaGraph | None = None

    def __call__(self) -> None:
        if self._graph is None and self._runs:
            self._graph = self._device.capture(self._calls)
        self._runs += 1
        if self._graph is None:
            for call in self._calls:
                call()
        else:
            self._graph.launch()
