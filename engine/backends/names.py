"""The names of backends, and nothing that needs one of them."""

from engine.errors import ConfigError
from engine.plans.tensorrt_module import Kind
from engine.sessions import CPU_PROVIDER

CPU = "cpu"
CUDA, CUDA_GRAPHS = "cuda", "cuda-graphs"  # ONNX Runtime; the latter replays recorded calls
OPENVINO, OPENVINO_BF16 = "openvino", "openvino-bf16"  # on the CPU; the latter in bfloat16
KINDS: dict[str, Kind] = {"tensorrt": "trt", "rtx": "rtx"}
BACKENDS = (CPU, OPENVINO, OPENVINO_BF16, CUDA, CUDA_GRAPHS, *KINDS)
_PROVIDER = "ExecutionProvider"  # how ONNX Runtime's names end


def plain_provider(backend: str) -> str | None:
    """The execution provider of a backend that keeps everything in the host's memory."""
    if backend == CPU:
        return CPU_PROVIDER
    return backend if backend.endswith(_PROVIDER) else None


def check_backend(backend: str) -> None:
    """Raise `ConfigError` for a name that is no backend's."""
    if backend not in BACKENDS and not backend.endswith(_PROVIDER):
        raise ConfigError(
            f"backend must be one of {', '.join(BACKENDS)}, or the name of an execution provider "
            f"of ONNX Runtime, got {backend!r}"
        )
