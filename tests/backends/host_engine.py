"""TensorRT's engines and contexts played by ONNX Runtime on the host's memory.

They compute, and they refuse what TensorRT documents that it refuses: shapes outside of the active
profile, addresses that are not aligned, calls without scratch memory or an address. Scratch memory
is overwritten by every call, as it is on a GPU.
"""

from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.device import ALIGNMENT, DeviceArray
from engine.backends.plan_program import OpenedPlan
from engine.bundle import TensorSpec
from engine.files import sha256_of_file
from engine.plans.manifest import PlanSpec
from engine.sessions import OnnxSession
from tests.backends.host_device import host_view


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class Dtype(Enum):
    FLOAT = "float32"
    HALF = "float16"
    INT32 = "int32"
    INT64 = "int64"


class HostRuntime:
    """Opens plans whose ONNX sources lie in some folders."""

    def __init__(self, *folders: Path) -> None:
        self._graphs = {
            sha256_of_file(path): path for folder in folders for path in folder.glob("*.onnx")
        }
        self.engines: dict[str, HostEngine] = {}

    def open(self, file: Path, plan: PlanSpec) -> OpenedPlan:
        assert file.read_bytes()[:4] == b"vtrt", "a plan by the real compiler"
        (graph,) = [self._graphs[sha256] for sha256 in plan.sources.values()]
        engine = self.engines[file.stem] = HostEngine(graph, plan)
        return OpenedPlan(engine=engine, make_context=engine.make_context)


class HostEngine:
    """What `PlanProgram` uses of `ICudaEngine`."""

    def __init__(self, graph: Path, plan: PlanSpec) -> None:
        self.plan = plan
        self.session = OnnxSession(graph, num_threads=1)
        self.contexts: list[HostContext] = []
        self.tensors = {tensor.name: tensor for tensor in (*plan.inputs, *plan.outputs)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.plan.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in {t.name for t in self.plan.inputs} else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Dtype:
        return Dtype(self.tensors[name].dtype)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(a if isinstance(a, int) else -1 for a in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Any]:
        return list(self.plan.profiles[index][name])

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        """Not TensorRT's number; like that it grows with what a profile takes at most."""
        profile = self.plan.profiles[index]
        return sum(int(np.prod(largest)) for _, _, largest in profile.values())

    def make_context(self) -> "HostContext":
        self.contexts.append(HostContext(self))
        return self.contexts[-1]


class HostContext:
    """What `PlanProgram` uses of `IExecutionContext`."""

    def __init__(self, engine: HostEngine) -> None:
        self.engine = engine
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.runs = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.plan.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= length <= b for a, length, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.tensors and address % ALIGNMENT == 0

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.scratch = (address, nbytes)

    def infer_shapes(self) -> list[str]:
        missing = [t.name for t in self.engine.plan.inputs if t.name not in self.shapes]
        if not missing:
            for name, values in self._run({n: np.zeros(s) for n, s in self.shapes.items()}).items():
                self.shapes[name] = values.shape
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def execute_async_v3(self, stream: int) -> bool:
        address, nbytes = self.scratch
        least = self.engine.get_device_memory_size_for_profile_v2(self.profile)
        if nbytes < least or self.addresses.keys() != self.engine.tensors.keys():
            return False
        inputs = {t.name: self._view(t) for t in self.engine.plan.inputs}
        outputs = self._run({name: values.copy() for name, values in inputs.items()})
        host_view(DeviceArray(address, (nbytes,), np.dtype(np.uint8), None))[:] = 0xFF
        for tensor in self.engine.plan.outputs:
            self._view(tensor)[...] = outputs[tensor.name]
        self.runs += 1
        return True

    def _run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return self.engine.session.run(feeds)

    def _view(self, tensor: TensorSpec) -> Any:
        dtype = np.dtype(tensor.dtype)
        shape = self.shapes[tensor.name]
        return host_view(DeviceArray(self.addresses[tensor.name], shape, dtype, None))
