"""Three small graphs around the denoiser, so that latents stay on the device from step to step.

    row_input      latents of the slots -> what the denoiser is told, one row for each prompt
    step_update    its answer -> the latents of the next step (engine/samplers.py, in numbers)
    decoder_input  latents of the slots -> what the decoder is told

The *state* of an image is one slot `[2 + history, channels, height, width]` in float32: latents,
the clean image predicted last, then earlier converted outputs, newest first. Slots that take no
part in a call are passed on as they are, by selection and not by a product with zero: what
overflows in one image must not reach another. All arithmetic is float32, whatever the denoiser
computes in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.bundle import ComponentSpec, Manifest, TensorSpec
from engine.errors import ProviderUnavailable
from engine.plans.profiles import ROWS_PER_IMAGE

ROW_INPUT, STEP_UPDATE, DECODER_INPUT = "row_input", "step_update", "decoder_input"
STEP_GRAPHS = (ROW_INPUT, STEP_UPDATE, DECODER_INPUT)
LATENTS, CLEAN, HISTORY = 0, 1, 2  # where things are in a slot's state
# Columns of the table of coefficients, before the weights b_0, b_1, ... of the history.
COLUMNS = ("active", *(f"weight_{row}" for row in range(ROWS_PER_IMAGE)), *"pqacef")
_OPSET, _IR_VERSION = 18, 8
_SUFFIX = "_slots"  # of what is kept per prompt and gathered for each row
_DTYPES = {"float32": 1, "float16": 10, "int32": 6}  # onnx.TensorProto's numbers


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A graph, and its inputs and outputs as a bundle describes those of its components."""

    model: Any  # onnx.ModelProto
    spec: ComponentSpec

    def write(self, folder: Path) -> Path:
        path = folder / self.spec.file
        path.write_bytes(self.model.SerializeToString())
        return path


def step_graphs(manifest: Manifest, history: int) -> dict[str, StepGraph]:
    """The three graphs for a bundle whose samplers look back at `history` earlier outputs."""
    components, channels = manifest.components, manifest.latents.channels
    return {
        ROW_INPUT: _row_input(components["denoiser"], channels, history),
        STEP_UPDATE: _step_update(components["denoiser"], channels, history),
        DECODER_INPUT: _decoder_input(components["vae_decoder"], channels, history),
    }


def slot_name(denoiser_input: str) -> str:
    """The input of `row_input` that holds what the slots have for an input of the denoiser."""
    return denoiser_input + _SUFFIX


def _row_input(denoiser: ComponentSpec, channels: int, history: int) -> StepGraph:
    graph = _Builder("row_input.onnx")
    latents = graph.slots_latents(channels, history)
    rows = graph.input("row_slot", "int32", ["rows"])
    prompts = graph.input("row_prompt", "int32", ["rows"])
    scale = graph.column(graph.input("scale", "float32", ["rows"]))
    for tensor in denoiser.inputs:
        if tensor.name == "timestep":
            continue  # a table of the host's, as it is
        if tensor.name == "latents":
            scaled = graph.add("Mul", graph.add("Gather", latents, rows, axis=0), scale)
            graph.output(tensor.name, graph.cast(scaled, tensor.dtype), tensor)
        else:
            kept = graph.input(slot_name(tensor.name), tensor.dtype, ["prompts", *tensor.shape[1:]])
            graph.output(tensor.name, graph.add("Gather", kept, prompts, axis=0), tensor)
    return graph.build()


def _step_update(denoiser: ComponentSpec, channels: int, history: int) -> StepGraph:
    (predicted,) = denoiser.outputs
    graph = _Builder("step_update.onnx")
    noise_pred = graph.cast(
        graph.input(predicted.name, predicted.dtype, predicted.shape), "float32"
    )
    state = graph.state(channels, history)
    shape: list[int | str] = ["slots", channels, "height", "width"]
    noise = graph.input("noise", "float32", shape)
    row_index = graph.input("row_index", "int32", ["slots", ROWS_PER_IMAGE])
    table = graph.input("coefficients", "float32", ["slots", len(COLUMNS) + history + 1])

    def coefficient(place: int) -> str:
        return graph.column(graph.pick(table, place))

    named = {name: coefficient(place) for place, name in enumerate(COLUMNS)}
    b = [coefficient(len(COLUMNS) + k) for k in range(history + 1)]
    guided = graph.sum(
        graph.add(
            "Mul",
            named[f"weight_{row}"],
            graph.add("Gather", noise_pred, graph.pick(row_index, row), axis=0),
        )
        for row in range(ROWS_PER_IMAGE)
    )
    latents = graph.pick(state, LATENTS)
    mixed = {
        (one, other): graph.sum(
            (graph.add("Mul", named[one], latents), graph.add("Mul", named[other], guided))
        )
        for one, other in ("pq", "ef")
    }
    entries = [mixed["p", "q"], *(graph.pick(state, HISTORY + k) for k in range(history))]
    terms = [graph.add("Mul", named["a"], latents)]
    terms += [graph.add("Mul", weight, entry) for weight, entry in zip(b, entries, strict=True)]
    updated = graph.sum([*terms, graph.add("Mul", named["c"], noise)])
    axis = graph.constant([1])
    lines = [updated, mixed["e", "f"], *entries[:history]]
    following = graph.add("Concat", *(graph.add("Unsqueeze", x, axis) for x in lines), axis=1)
    active = graph.add("Greater", graph.add("Unsqueeze", named["active"], axis), graph.half())
    output = TensorSpec(name="next_state", dtype="float32", shape=_state_shape(channels, history))
    graph.output("next_state", graph.add("Where", active, following, state), output)
    return graph.build()


def _decoder_input(decoder: ComponentSpec, channels: int, history: int) -> StepGraph:
    (latents,) = decoder.inputs
    graph = _Builder("decoder_input.onnx")
    kept = graph.slots_latents(channels, history)
    chosen = graph.add("Gather", kept, graph.input("image_slot", "int32", ["batch"]), axis=0)
    graph.output(latents.name, graph.cast(chosen, latents.dtype), latents)
    return graph.build()


def _state_shape(channels: int, history: int) -> list[int | str]:
    return ["slots", HISTORY + history, channels, "height", "width"]


class _Builder:
    """Nodes in the order in which they are written down, each with one output of a made-up name."""

    def __init__(self, file: str) -> None:
        try:
            import onnx
        except ImportError as error:
            raise ProviderUnavailable(
                f"onnx is not installed ({error}); it comes with `pip install oneword[gpu]` and "
                "with oneword[rtx]"
            ) from error
        self._onnx: Any = onnx
        self._file = file
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[TensorSpec] = []
        self._outputs: list[TensorSpec] = []

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        self._inputs.append(TensorSpec(name=name, dtype=dtype, shape=list(shape)))
        return name

    def state(self, channels: int, history: int) -> str:
        return self.input("state", "float32", _state_shape(channels, history))

    def slots_latents(self, channels: int, history: int) -> str:
        """The latents `[slots, channels, height, width]` of the state."""
        return self.pick(self.state(channels, history), LATENTS)

    def output(self, name: str, value: str, like: TensorSpec) -> None:
        self._nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))
        self._outputs.append(TensorSpec(name=name, dtype=like.dtype, shape=like.shape))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self._nodes)}"
        node = self._onnx.helper.make_node(operator, list(inputs), [name], **attributes)
        self._nodes.append(node)
        return name

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        name = f"k{len(self._constants)}"
        array = np.array(values, dtype)
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def half(self) -> str:
        return self.constant(0.5, np.float32)

    def pick(self, value: str, place: int) -> str:
        """`value[:, place]`."""
        return self.add("Gather", value, self.constant(place), axis=1)

    def column(self, value: str) -> str:
        """`[n]` as `[n, 1, 1, 1]`."""
        return self.add("Unsqueeze", value, self.constant([1, 2, 3]))

    def sum(self, terms: Any) -> str:
        """Added from the left: the order of `engine.samplers.step`."""
        first, *others = terms
        for term in others:
            first = self.add("Add", first, term)
        return first

    def cast(self, value: str, dtype: str) -> str:
        return self.add("Cast", value, to=_DTYPES[dtype])

    def build(self) -> StepGraph:
        helper = self._onnx.helper
        infos = [
            [helper.make_tensor_value_info(t.name, _DTYPES[t.dtype], t.shape) for t in tensors]
            for tensors in (self._inputs, self._outputs)
        ]
        graph = helper.make_graph(self._nodes, self._file, *infos, initializer=self._constants)
        opset = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION)
        self._onnx.checker.check_model(model)
        spec = ComponentSpec(file=self._file, inputs=self._inputs, outputs=self._outputs)
        return StepGraph(model, spec)
