"""Compiled plans as programs: which profile takes a call, where its memory is, what it may hold.

Written against the Python objects of TensorRT (engine, execution context) and nothing else of it,
so that all of this also runs where those are played by ONNX Runtime on the host's memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.backends.device import ALIGNMENT, Call, Device, DeviceArray
from engine.bundle import ComponentSpec, TensorSpec
from engine.errors import BundleError, ProviderUnavailable
from engine.plans.manifest import PlanManifest, PlanSpec
from engine.plans.profiles import choose_profile

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedPlan:
    """A deserialized plan: TensorRT's engine, and how contexts of it are made."""

    engine: Any
    make_context: Callable[[], Any]  # with memory that its user provides
    warmed_up: Callable[[], None] = lambda: None  # told when a context has run for the first time


class Scratch:
    """One block of memory that all contexts compute in: they run one after the other."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._nbytes = 0
        self._block: DeviceArray | None = None

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def need(self, nbytes: int) -> None:
        """Say so before the first `block`: addresses that were given out stay as they are."""
        assert self._block is None or nbytes <= self._nbytes, "a plan opened after the first call"
        self._nbytes = max(self._nbytes, nbytes)

    def block(self) -> DeviceArray:
        if self._block is None:
            self._block = self._device.empty([self._nbytes], np.uint8)
        return self._block


class PlanProgram:
    """One component of a bundle, compiled."""

    def __init__(
        self,
        opened: OpenedPlan,
        name: str,
        manifest: PlanManifest,
        *,
        scratch: Scratch,
        stream: int = 0,
    ) -> None:
        """Raises `BundleError` where the plan is not what its manifest says."""
        self._opened, self._name, self._manifest = opened, name, manifest
        self._plan: PlanSpec = manifest.components[name]
        self._scratch, self._stream = scratch, stream
        self._check()
        for index in range(len(self._plan.profiles)):
            scratch.need(int(opened.engine.get_device_memory_size_for_profile_v2(index)))

    @property
    def spec(self) -> ComponentSpec:
        plan = self._plan
        return ComponentSpec(file=plan.file, inputs=plan.inputs, outputs=plan.outputs)

    @property
    def limits(self) -> str:
        """What its plans take and how they could take more, in words."""
        return (
            f"the plans for {self._manifest.target} take {', '.join(self._manifest.buckets)} and "
            f"at most {self._max_chunks()} prompt chunks; compile more sizes with build_engines.py "
            "--bucket WIDTHxHEIGHT"
        )

    def largest(self, axis: str) -> int | None:
        lengths = [
            profile[tensor.name][2][place]
            for profile in self._plan.profiles
            for tensor in self._plan.inputs
            for place, found in enumerate(tensor.shape)
            if found == axis
        ]
        return max(lengths, default=None)

    def takes(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        return choose_profile(self._plan.profiles, shapes) is not None

    def bind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Call:
        """A context of its own for these arrays: a CUDA graph of it stays valid."""
        self._check_arrays(inputs, outputs)
        shapes = {name: array.shape for name, array in inputs.items()}
        index = choose_profile(self._plan.profiles, shapes)
        if index is None:
            raise ProviderUnavailable(f"{self._name} with inputs {shapes}: {self.limits}")
        context = self._opened.make_context()
        self._do(context.set_optimization_profile_async(index, self._stream), f"profile {index}")
        for name, array in inputs.items():
            self._do(context.set_input_shape(name, array.shape), f"{name} {array.shape}")
        if missing := context.infer_shapes():
            raise BundleError(f"{self._plan.file} wants more inputs: {', '.join(missing)}")
        for name, array in outputs.items():
            found = tuple(context.get_tensor_shape(name))
            if found != array.shape:
                raise BundleError(
                    f"{self._plan.file} gives {name} {found}, expected is {array.shape}"
                )
        for name, array in (*inputs.items(), *outputs.items()):
            assert array.address % ALIGNMENT == 0, f"{name} is not aligned"
            self._do(context.set_tensor_address(name, array.address), f"an address for {name}")
        block = self._scratch.block()
        context.set_device_memory(block.address, block.nbytes)
        return _PlanCall(self, context, (dict(inputs), dict(outputs), block))

    def enqueue(self, context: Any) -> None:
        self._do(context.execute_async_v3(self._stream), "a call")

    def warmed_up(self) -> None:
        self._opened.warmed_up()

    def _do(self, done: bool, what: str) -> None:
        if not done:
            raise ProviderUnavailable(
                f"TensorRT refuses {what} of {self._plan.file}; oneword doctor tries the plans one "
                "by one"
            )

    def _check(self) -> None:
        """Hold the engine against its manifest: names, dtypes, axes and profiles."""
        engine, plan = self._opened.engine, self._plan
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for mode, tensors in (("INPUT", plan.inputs), ("OUTPUT", plan.outputs)):
            found = {
                name: (self._dtype(name), len(engine.get_tensor_shape(name)))
                for name in names
                if engine.get_tensor_mode(name).name == mode
            }
            expected = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in tensors}
            if found != expected:
                raise BundleError(
                    f"{plan.file} has {mode.lower()}s {found}, its manifest says {expected}"
                )
        if engine.num_optimization_profiles != len(plan.profiles):
            raise BundleError(
                f"{plan.file} has {engine.num_optimization_profiles} profiles, its manifest says "
                f"{len(plan.profiles)}"
            )
        for index, profile in enumerate(plan.profiles):
            for name, shapes in profile.items():
                found = [list(shape) for shape in engine.get_tensor_profile_shape(name, index)]
                if found != [list(shape) for shape in shapes]:
                    raise BundleError(
                        f"{plan.file} takes {name} {found} in profile {index}, its manifest says "
                        f"{list(shapes)}"
                    )

    def _dtype(self, name: str) -> str:
        dtype: str = self._opened.engine.get_tensor_dtype(name).name
        return _DTYPES.get(dtype, dtype)

    def _check_arrays(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        for tensors, arrays in ((self._plan.inputs, inputs), (self._plan.outputs, outputs)):
            assert {t.name: t.dtype for t in tensors} == {
                name: str(array.dtype) for name, array in arrays.items()
            }, f"{self._name} is bound to {list(arrays)}"

    def _max_chunks(self) -> int:
        prompts: list[TensorSpec] = [t for t in self._plan.inputs if "tokens" in t.shape]
        if not prompts:
            return 1
        place = prompts[0].shape.index("tokens")
        low, _, high = self._plan.profiles[0][prompts[0].name]
        return high[place] // low[place]


class _PlanCall:
    """A context with everything set, and what must live as long as it."""

    def __init__(self, program: PlanProgram, context: Any, keep: object) -> None:
        self._program, self._context, self._keep = program, context, keep
        self._has_run = False

    def __call__(self) -> None:
        self._program.enqueue(self._context)
        if not self._has_run:
            self._has_run = True
            self._program.warmed_up()
