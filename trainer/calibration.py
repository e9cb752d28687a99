"""The range of tensors inside a denoiser, seen while it draws: what static quantization needs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from engine.bundle import Bundle
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest, Limits
from engine.sessions import Array, Feeds, OnnxSession, Session
from trainer.onnx_surgery import save_graph
from trainer.quantization import Layer, Ranges, quantize, quantized_layers

PROMPTS = (
    "a photo of a red car on a street",
    "a cat and a dog on a meadow",
    "a painting of a house by the sea at night",
    "a close-up photo of a yellow flower on a white background",
    "three strawberries",
    "a rendition of a penguin in the snow",
    "a blue bird above a tree",
    "",
)
NUM_INFERENCE_STEPS = 4  # from pure noise to none; as many as every bundle has tables for
GUIDANCE_SCALE = 5.0
LEAST, GREATEST = "/least", "/greatest"


def quantize_denoiser(
    folder: Path, *, pixels: int | None = None, num_prompts: int = len(PROMPTS)
) -> None:
    """Put the denoiser of a complete float32 bundle into 8 bits, in place; not its manifest.

    Calibrated on images of `pixels` a side, the model's own size by default.
    """
    bundle = Bundle.open(folder)
    path = folder / bundle.manifest.components["denoiser"].file
    size = pixels or bundle.manifest.latents.default_size
    recording = path.with_name(".recording.onnx")  # here, since its weights are told from here
    try:
        _write_recording_graph(path, recording)
        ranges = measure_ranges(bundle, recording, pixels=size, prompts=PROMPTS[:num_prompts])
    finally:
        recording.unlink(missing_ok=True)
    model = onnx.load(path)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    quantize(model, quantized_layers(model.graph), ranges)
    save_graph(model, path)


def _write_recording_graph(path: Path, recording: Path) -> None:
    """The graph with ranges as outputs; weights beside it are shared, not copied."""
    model = onnx.load(path, load_external_data=False)
    add_range_outputs(model, quantized_layers(model.graph))
    onnx.save_model(model, recording)


def add_range_outputs(model: onnx.ModelProto, layers: Sequence[Layer]) -> None:
    """Make the ranges of the channels that `layers` ask for further outputs, in place."""
    others = {True: "ranges/pixels", False: "ranges/tokens"}  # the axes beside the channels
    for is_convolution, axes in ((True, [0, 2, 3]), (False, [0, 1])):
        tensor = numpy_helper.from_array(np.array(axes, np.int64), others[is_convolution])
        model.graph.initializer.append(tensor)
    tensors = {tensor: layer.is_convolution for layer in layers for tensor in layer.tensors}
    for tensor, is_convolution in tensors.items():
        for kind, suffix in (("ReduceMin", LEAST), ("ReduceMax", GREATEST)):
            name, inputs = tensor + suffix, [tensor, others[is_convolution]]
            model.graph.node.append(onnx.helper.make_node(kind, inputs, [name], keepdims=0))
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None])
            )


class RangeRecorder:
    """A denoiser's session that remembers the ranges that its graph gives beside its answer."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.ranges: dict[str, Ranges] = {}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        outputs = self._session.run(feeds)
        for name in [name for name in outputs if name.endswith(LEAST)]:
            tensor = name.removesuffix(LEAST)
            seen = np.stack([outputs.pop(name), outputs.pop(tensor + GREATEST)])
            known = self.ranges.setdefault(tensor, seen)
            np.minimum(known[0], seen[0], out=known[0])
            np.maximum(known[1], seen[1], out=known[1])
        return outputs


def measure_ranges(
    bundle: Bundle, recording_graph: Path, *, pixels: int, prompts: Sequence[str]
) -> dict[str, Ranges]:
    """Draw an image of each prompt with a graph of `add_range_outputs`."""
    recorder = RangeRecorder(OnnxSession(recording_graph))
    sessions: dict[str, Session] = {
        name: bundle.open_session(name) for name in bundle.manifest.components if name != "denoiser"
    }
    pipeline = Pipeline(bundle, sessions | {"denoiser": recorder}, limits=Limits())
    for seed, prompt in enumerate(prompts):
        request = GenerationRequest(
            prompt=prompt,
            width=pixels,
            height=pixels,
            seed=seed,
            sampler="ddim",
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
        )
        images = pipeline.begin(pipeline.plan(request))
        while not images[0].is_done:
            pipeline.step(images)
    return recorder.ranges
