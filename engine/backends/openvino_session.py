"""Graphs in OpenVINO on the CPU, in float32 or in bfloat16.

docs/cpu-backend.md has the figures: on processors with bfloat16 arithmetic it is twice as fast as
float32 anywhere, at a fraction of int8's loss.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.bundle import Bundle
from engine.errors import BundleError, ProviderUnavailable
from engine.sessions import Array, Feeds, Session, usable_cores

Precision = Literal["f32", "bf16"]
REMEDY = "pip install oneword[openvino]"


def open_openvino_sessions(bundle: Bundle, precision: Precision) -> dict[str, Session]:
    """Every graph of a bundle. Raises `ProviderUnavailable` with the remedy, or `BundleError`."""
    core = openvino_core(precision)
    return {
        name: OpenVinoSession(core, bundle.path / spec.file, precision)
        for name, spec in bundle.manifest.components.items()
    }


def openvino_core(precision: Precision) -> Any:
    """OpenVINO, knowing the bundle's attention; refused where it would compute in float32."""
    try:
        import openvino
        from openvino.frontend.onnx import ConversionExtension
    except ImportError as error:
        raise ProviderUnavailable(f"OpenVINO is not installed; {REMEDY}") from error
    core: Any = openvino.Core()
    can = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in can:
        raise ProviderUnavailable(
            "this processor has no bfloat16 arithmetic, OpenVINO computes here in "
            f"{', '.join(can)}; use --backend openvino, or a bundle of --precision int8"
        )
    core.add_extension(ConversionExtension("MultiHeadAttention", "com.microsoft", _attention))
    return core


def _attention(node: Any) -> list[Any]:
    """What `trainer/attention_fusion.py` puts into bundles, in OpenVINO's own operators."""
    from openvino import opset13 as ops

    heads = int(node.get_attribute("num_heads"))
    query, key, value = (
        ops.transpose(
            ops.reshape(node.get_input(index), np.array([0, 0, heads, -1]), special_zero=True),
            np.array([0, 2, 1, 3]),
        )
        for index in range(3)
    )
    mixed = ops.scaled_dot_product_attention(query, key, value)  # by 1 / sqrt(dim)
    joined = ops.reshape(
        ops.transpose(mixed, np.array([0, 2, 1, 3])), np.array([0, 0, -1]), special_zero=True
    )
    return joined.outputs()


class OpenVinoSession:
    """A graph, compiled for the latency of one call; its axes stay dynamic."""

    def __init__(self, core: Any, model_path: Path, precision: Precision) -> None:
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": usable_cores(),
            "ENABLE_CPU_PINNING": False,  # others use the cores as well
        }
        try:
            compiled: Any = core.compile_model(str(model_path), "CPU", options)
        except RuntimeError as error:
            raise BundleError(f"{model_path.name} cannot be loaded by OpenVINO: {error}") from error
        self._request: Any = compiled.create_infer_request()
        # A port may go by several names, of which the graph's is one.
        self._dtypes = {
            n: port.element_type.to_dtype() for port in compiled.inputs for n in port.names
        }
        self._outputs = [name for port in compiled.outputs for name in port.names]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        inputs = {
            name: np.asarray(array, dtype=self._dtypes[name], order="C")
            for name, array in feeds.items()
        }
        self._request.infer(inputs, share_inputs=True)
        return {name: self._request.get_tensor(name).data.copy() for name in self._outputs}
