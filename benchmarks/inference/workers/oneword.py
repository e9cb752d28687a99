"""OneWord's runtime. settings: bundle, backend ("cpu", "openvino" or "openvino-bf16")."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from worker import Array, gflops, read_settings, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from engine.backends.openvino_session import open_openvino_sessions
from engine.bundle import Bundle
from engine.pipeline import Pipeline, open_sessions, sound
from engine.requests import GenerationRequest, Limits


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
        backend = settings.get("backend", "cpu")
        sessions = (
            open_openvino_sessions(bundle, "bf16" if backend == "openvino-bf16" else "f32")
            if backend.startswith("openvino")
            else open_sessions(bundle, "CPUExecutionProvider")
        )
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
