"""Loaded models behind one small protocol. The only file that imports onnxruntime."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.errors import BundleError, ProviderUnavailable

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


@runtime_checkable
class Session(Protocol):
    """A loaded graph. Everything above this line sees nothing else of a backend."""

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the graph once; arrays are cast to the dtypes of the graph's inputs."""
        ...


CPU_PROVIDER = "CPUExecutionProvider"

# Each session has threads of its own, which spin for a while when their work is done: those of the
# denoiser took a core from the decoder. Bounded, an image of the embedded model took 216 ms instead
# of 270 on two cores, and other threads were late less often (docs/cpu-backend.md).
_SPIN_US = 2000
_MAPPED_BYTES = 1024  # weights of a prepared graph that are smaller are part of its protobuf
_ORT_DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
}


def check_onnxruntime_install() -> None:
    """Refuse an environment where onnxruntime is missing or installed twice.

    `onnxruntime` and `onnxruntime-gpu` write into the same folder; whichever came last wins and the
    other one's libraries are silently gone.
    """
    installed = [
        name
        for name in ("onnxruntime", "onnxruntime-gpu")
        if any(True for _ in importlib.metadata.distributions(name=name))
    ]
    if not installed:
        raise ProviderUnavailable(
            "ONNX Runtime is not installed; install oneword[cpu], or oneword[gpu] for NVIDIA GPUs"
        )
    if len(installed) > 1:
        raise ProviderUnavailable(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "uninstall both, then install oneword[cpu] or oneword[gpu]"
        )


def import_onnxruntime() -> Any:
    """The module, where exactly one of its packages is installed."""
    check_onnxruntime_install()
    import onnxruntime

    return onnxruntime


class _Threads:
    """Of this process: ONNX Runtime makes them once."""

    are_shared = False


_threads = _Threads()


def share_threads() -> None:
    """Let all sessions of this process compute on one set of threads, one for each core.

    For who owns the process, before its first session: other users of ONNX Runtime in it would be
    bound to the same. Where one session follows the other, none waits for the other's threads to
    stop spinning (docs/cpu-backend.md).
    """
    import_onnxruntime().set_global_thread_pool_sizes(usable_cores(), 1)
    _threads.are_shared = True


class OnnxSession:
    """An ONNX Runtime session on exactly the execution provider that was asked for."""

    def __init__(
        self,
        model_path: Path,
        *,
        execution_provider: str = CPU_PROVIDER,
        num_threads: int | None = None,
        is_prepared: bool = False,
        prepared: Path | None = None,
    ) -> None:
        """Load a graph: as it is, or one that a session has prepared.

        With `prepared` this session prepares it: it writes the graph there as it runs it, and its
        weights, packed, beside that (`NAME.data`), to be loaded with `is_prepared`.
        """
        ort = import_onnxruntime()
        available = ort.get_available_providers()
        if execution_provider not in available:
            raise ProviderUnavailable(
                f"asked for {execution_provider}, this ONNX Runtime has {', '.join(available)}"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if _threads.are_shared and num_threads is None:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = num_threads or usable_cores()
            options.inter_op_num_threads = 1
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
        if sums_overflow():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if is_prepared:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if prepared is not None:
            options.optimized_model_filepath = str(prepared)
            for name, value in _preparing(prepared).items():
                options.add_session_config_entry(f"session.{name}", value)
        try:
            self._session = ort.InferenceSession(
                str(model_path), options, providers=[execution_provider]
            )
        except Exception as error:  # onnxruntime raises a dozen unrelated classes of its own
            raise BundleError(f"{model_path.name} cannot be loaded: {error}") from error
        if execution_provider not in self._session.get_providers():
            raise ProviderUnavailable(
                f"asked for {execution_provider}, got {self._session.get_providers()}"
            )
        self._dtypes = {i.name: _ORT_DTYPES[i.type] for i in self._session.get_inputs()}
        self._outputs = [output.name for output in self._session.get_outputs()]

    @property
    def input_shapes(self) -> dict[str, list[int | str]]:
        """Shapes as the graph declares them; a name stands for a dynamic axis."""
        return {i.name: list(i.shape) for i in self._session.get_inputs()}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        inputs = {
            name: np.asarray(array, dtype=self._dtypes[name], order="C")
            for name, array in feeds.items()
        }
        outputs = self._session.run(self._outputs, inputs)
        return {n: np.asarray(o) for n, o in zip(self._outputs, outputs, strict=True)}


def _preparing(graph: Path) -> dict[str, str]:
    return {
        "save_external_prepacked_constant_initializers": "1",
        "optimized_model_external_initializers_file_name": f"{graph.name}.data",
        "optimized_model_external_initializers_min_size_in_bytes": str(_MAPPED_BYTES),
    }


def sums_overflow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether 8-bit products are added up in 16 bits, which overflow: x86 without VNNI.

    ONNX Runtime has kernels that do not, of half the speed; it takes them where it is told to,
    also on processors that need none. Where nothing is known of the processor, the safe answer.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in cpuinfo.read_text()
    except OSError:
        return True


def usable_cores() -> int:
    """The cores that this process may use: what a container or taskset leaves it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
