"""OneWord's runtime, or the same loop with OpenVINO in the place of ONNX Runtime.

settings: bundle, backend ("onnxruntime" or "openvino"), precision of OpenVINO ("f32" or "bf16").
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from worker import Array, gflops, read_settings, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from engine.bundle import Bundle
from engine.pipeline import Pipeline, open_sessions, sound
from engine.requests import GenerationRequest, Limits


class OpenVinoSession:
    """A graph in OpenVINO, compiled for latency, with dynamic shapes."""

    def __init__(self, path: Path, precision: str) -> None:
        import openvino  # pyright: ignore[reportMissingImports]

        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        compiled: Any = openvino.Core().compile_model(str(path), "CPU", options)
        self._request: Any = compiled.create_infer_request()
        # A port may go by several names, of which `any_name` is any.
        self._types = {n: p.element_type.to_dtype() for p in compiled.inputs for n in p.names}
        self._outputs = [name for port in compiled.outputs for name in port.names]

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        cast = {name: np.ascontiguousarray(a, self._types[name]) for name, a in feeds.items()}
        self._request.infer(cast, share_inputs=True)
        return {name: self._request.get_tensor(name).data.copy() for name in self._outputs}


def onnxruntime_gflops(size: int = 2048, times: int = 5) -> float:
    """The best rate of ONNX Runtime's own float32 matrix product, in GFLOP/s."""
    import onnx
    import onnxruntime

    shape = [size, size]
    tensors = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in "xy"]
    matrix = np.random.default_rng(0).standard_normal(shape, np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        tensors[:1],
        tensors[1:],
        [onnx.numpy_helper.from_array(matrix, "w")],
    )
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return gflops(lambda: session.run(None, {"x": matrix}), size, times)


class OneWordSystem:
    """Bundle, sessions and the loop of `engine.pipeline`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        bundle = Bundle.open(Path(settings["bundle"]))
        if settings.get("backend") == "openvino":
            sessions: dict[str, Any] = {
                name: OpenVinoSession(bundle.path / spec.file, settings["precision"])
                for name, spec in bundle.manifest.components.items()
                if name != "vae_encoder"
            }
            sessions["vae_encoder"] = None
        else:
            sessions = open_sessions(bundle, "CPUExecutionProvider")
        self._denoiser = sessions["denoiser"]
        self._pipeline = Pipeline(bundle, sessions, limits=Limits())

    def call(self, feeds: dict[str, Array]) -> Array:
        return self._denoiser.run(feeds)["noise_pred"]

    def peak(self) -> float:
        return onnxruntime_gflops()

    def draw(self, work: dict[str, Any]) -> Array:
        request = GenerationRequest(
            prompt=work["prompt"],
            seed=work["seed"],
            width=work["pixels"],
            height=work["pixels"],
            sampler="ddim",
            num_inference_steps=work["steps"],
            guidance_scale=work["guidance"],
        )
        images = self._pipeline.begin(self._pipeline.plan(request))
        while not images[0].is_done:
            self._pipeline.step(images)
        return sound(self._pipeline.decode(images))[0] / 255.0


if __name__ == "__main__":
    settings = read_settings()
    serve(OneWordSystem(settings), settings)
