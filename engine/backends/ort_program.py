"""Graphs in ONNX Runtime on memory that is ours: IO binding by address.

The same on every execution provider: on the CPU with the host's memory, on CUDA with that of
`cuda_device`, whose stream the provider then works on, so that nobody waits between calls.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from engine.backends.device import Call, DeviceArray
from engine.bundle import ComponentSpec
from engine.errors import BundleError, ProviderUnavailable
from engine.sessions import import_onnxruntime, usable_cores

Memory = Literal["cpu", "cuda"]
_PROVIDERS: dict[Memory, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NO_GRAPH = "-1"  # of CUDA: run this shape as it comes


class OrtProgram:
    """A graph in ONNX Runtime; it takes every shape."""

    limits = "ONNX Runtime takes every size"

    def __init__(
        self,
        graph: Path | bytes,
        spec: ComponentSpec,
        *,
        memory: Memory = "cpu",
        stream: int = 0,
        cuda_graphs: bool = False,
        num_threads: int | None = None,
    ) -> None:
        """`stream`: the CUDA stream that it works on. Raises where the provider cannot be had."""
        ort = import_onnxruntime()
        provider = _PROVIDERS[memory]
        if provider not in ort.get_available_providers():
            raise ProviderUnavailable(
                f"this ONNX Runtime has {', '.join(ort.get_available_providers())} and not "
                f"{provider}; uninstall onnxruntime and install oneword[gpu]"
            )
        self._ort: Any = ort
        self._memory = memory
        self._cuda_graphs = cuda_graphs and memory == "cuda"
        self._num_graphs = 0
        self._spec = spec
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads or usable_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        settings = _cuda_settings(stream, self._cuda_graphs) if memory == "cuda" else {}
        try:
            self._session = ort.InferenceSession(
                str(graph) if isinstance(graph, Path) else graph, options, [(provider, settings)]
            )
        except Exception as error:  # onnxruntime raises a dozen unrelated classes of its own
            raise BundleError(f"{spec.file} cannot be loaded: {error}") from error
        given = self._session.get_providers()
        if provider not in given:  # it falls back with a warning
            raise ProviderUnavailable(
                f"asked for {provider}, ONNX Runtime gave {', '.join(given)}; its CUDA libraries "
                "or the driver do not fit (oneword doctor says more)"
            )
        expected = {tensor.name: tensor.shape for tensor in spec.inputs}
        found: dict[str, Any] = {i.name: list(i.shape) for i in self._session.get_inputs()}
        if found != expected:
            raise BundleError(f"{spec.file} takes {found}, the manifest says {expected}")

    @property
    def spec(self) -> ComponentSpec:
        return self._spec

    def largest(self, axis: str) -> int | None:
        """Any length of any axis."""
        return None

    def takes(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        return True

    def bind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Call:
        """Fix the arrays of a call; its outputs are written where they are, never allocated."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, *self._place(array))
        for name, array in outputs.items():
            binding.bind_output(name, *self._place(array))
        run_options = self._ort.RunOptions()
        if self._memory == "cuda":
            # The stream is ours and keeps the order; whoever wants a result waits for the stream.
            run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            run_options.add_run_config_entry("gpu_graph_id", self._graph_number())
        session = self._session

        def run(_keep: object = (dict(inputs), dict(outputs))) -> None:
            session.run_with_iobinding(binding, run_options)

        return run

    def _place(self, array: DeviceArray) -> tuple[Any, ...]:
        return (self._memory, 0, array.dtype.type, array.shape, array.address)

    def _graph_number(self) -> str:
        """A CUDA graph of its own for each call that is bound: addresses and shapes are fixed."""
        if not self._cuda_graphs:
            return _NO_GRAPH
        self._num_graphs += 1
        return str(self._num_graphs)


def _cuda_settings(stream: int, cuda_graphs: bool) -> dict[str, str]:
    return {
        "device_id": "0",
        "user_compute_stream": str(stream),
        "enable_cuda_graph": "1" if cuda_graphs else "0",
        # Memory in the sizes that are asked for: one model at a time, of known shapes.
        "arena_extend_strategy": "kSameAsRequested",
    }
