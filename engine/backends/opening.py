"""A bundle opened on the backend that was asked for, or an error that says what is missing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from engine.backends.cuda_device import CudaDevice, find_gpu
from engine.backends.device import Device, Program
from engine.backends.device_model import DeviceImageModel, history_of
from engine.backends.names import (
    CPU,
    CUDA,
    CUDA_GRAPHS,
    KINDS,
    OPENVINO,
    OPENVINO_BF16,
    check_backend,
    plain_provider,
)
from engine.backends.openvino_session import open_openvino_sessions
from engine.backends.ort_program import OrtProgram
from engine.backends.plan_program import OpenedPlan, PlanProgram, Scratch
from engine.backends.step_graphs import STEP_GRAPHS, step_graphs
from engine.backends.tensorrt_runtime import TensorRtRuntime, default_cache_dir
from engine.bundle import Bundle
from engine.pipeline import ImageModel, open_sessions
from engine.plans.manifest import PlanSpec
from engine.plans.selection import Plans, select_plans
from engine.plans.tensorrt_module import Kind, import_tensorrt


def open_model(bundle: Bundle, backend: str = CPU) -> ImageModel:
    """The graphs of a verified bundle, ready for images; there is no quiet fall-back.

    Raises `ProviderUnavailable` where the backend cannot be had, and how it can; `BundleError` for
    plans that do not fit.
    """
    check_backend(backend)
    if backend in KINDS:
        return open_plans(bundle, KINDS[backend])
    if backend in (CUDA, CUDA_GRAPHS):
        return open_cuda(bundle, cuda_graphs=backend == CUDA_GRAPHS)
    if backend in (OPENVINO, OPENVINO_BF16):
        precision = "bf16" if backend == OPENVINO_BF16 else "f32"
        return ImageModel(bundle, open_openvino_sessions(bundle, precision))
    provider = plain_provider(backend)
    assert provider is not None
    return ImageModel(bundle, open_sessions(bundle, provider))


def open_cuda(bundle: Bundle, *, cuda_graphs: bool) -> ImageModel:
    """ONNX Runtime on the GPU, on memory that is ours."""
    device = CudaDevice(records=False)  # ONNX Runtime records its own graphs
    settings: dict[str, Any] = {
        "memory": "cuda",
        "stream": device.stream,
        "cuda_graphs": cuda_graphs,
    }
    return DeviceImageModel(bundle, device, ort_programs(bundle, **settings))


def ort_programs(bundle: Bundle, **settings: Any) -> dict[str, Program]:
    """Every graph of a bundle in ONNX Runtime, and those between them."""
    components = bundle.manifest.components.items()
    graphs = step_graphs(bundle.manifest, history_of(bundle.sampler_tables)).items()
    return {
        **{n: OrtProgram(bundle.path / spec.file, spec, **settings) for n, spec in components},
        **{
            name: OrtProgram(graph.model.SerializeToString(), graph.spec, **settings)
            for name, graph in graphs
        },
    }


def open_plans(bundle: Bundle, kind: Kind) -> ImageModel:
    """Compiled plans on the GPU."""
    trt = import_tensorrt(kind)
    gpu = find_gpu()
    plans = select_plans(
        bundle.path,
        build_key=bundle.manifest.build_key,
        kind=kind,
        capability=gpu.capability,
        library_version=str(trt.__version__),
        components=(*bundle.manifest.components, *STEP_GRAPHS),
    )
    device = CudaDevice(records=kind == "trt")  # TensorRT for RTX records its own graphs
    runtime = TensorRtRuntime(kind, gpu_name=gpu.name, cache_dir=default_cache_dir())
    programs = plan_programs(plans, runtime, device, stream=device.stream)
    return DeviceImageModel(bundle, device, programs)


@runtime_checkable
class PlanRuntime(Protocol):
    """What opens plans."""

    def open(self, file: Path, plan: PlanSpec) -> OpenedPlan: ...


def plan_programs(
    plans: Plans, runtime: PlanRuntime, device: Device, *, stream: int = 0
) -> Mapping[str, Program]:
    """Every plan of a target, on one block of scratch memory."""
    scratch = Scratch(device)
    return {
        name: PlanProgram(
            runtime.open(plans.folder / plan.file, plan),
            name,
            plans.manifest,
            scratch=scratch,
            stream=stream,
        )
        for name, plan in plans.manifest.components.items()
    }
