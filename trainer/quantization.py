"""A denoiser whose convolutions and matrix products compute in 8 bits, from a float32 graph.

Static quantization (Jacob et al. 2018, arXiv 1712.05877): weights in int8, a scale for each output
channel; activations in uint8, a scale and a zero for each tensor, found beforehand
(trainer/calibration.py). Dynamic scales would be taken over a whole batch, so that an image would
depend on what shares its call. Written as pairs of QuantizeLinear and DequantizeLinear, which ONNX
Runtime turns into 8-bit kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from jaxtyping import Float32, Int8, UInt8
from onnx import numpy_helper

Ranges = Float32[np.ndarray, "2 channels"]  # least and greatest value in each channel
Floats = Float32[np.ndarray, " channels"]
_LEVELS = 255  # steps of a uint8
_MIDDLE = 128
# Of a channel's range, beyond what calibration saw: some hundred images see less than a channel may
# give. Measured on the embedded model with prompts other than those of calibration, rms error of a
# call: 1.0: 2.9 %, 1.25: 2.3 %, 1.5: 2.3 %, 2.0: 2.5 %; one range for all channels: 3.0 %.
HEADROOM = 1.5
_LARGEST = 127  # of a symmetric int8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A convolution or matrix product that is quantized."""

    node: onnx.NodeProto
    weight: str
    channel_axis: int  # of the weight: its output channels

    @property
    def is_convolution(self) -> bool:
        return self.node.op_type == "Conv"

    @property
    def tensors(self) -> tuple[str, ...]:
        """Activations whose range must be known: ONNX Runtime's 8-bit convolution gives 8 bits."""
        entering = self.node.input[0]
        return (entering, self.node.output[0]) if self.is_convolution else (entering,)


def quantized_layers(graph: onnx.GraphProto) -> list[Layer]:
    """The layers of a UNet that take most of its time and bear 8 bits.

    In float32 stay: what reads an input of the graph (the first convolution, and the keys and
    values of the prompt, where a new concept may go beyond any range seen), the last convolution,
    the time embedding (Gemm nodes), and the shortcuts, which read two tensors side by side.
    """
    weights = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    inputs = {tensor.name for tensor in graph.input}
    outputs = {tensor.name for tensor in graph.output}
    layers: list[Layer] = []
    for node in graph.node:
        rank = {"Conv": 4, "MatMul": 2}.get(node.op_type)
        if rank is None or weights.get(node.input[1]) != rank or node.input[0] in inputs:
            continue
        if outputs.intersection(node.output) or "conv_shortcut" in node.name:
            continue
        layers.append(Layer(node=node, weight=node.input[1], channel_axis=0 if rank == 4 else 1))
    return layers


def quantize(model: onnx.ModelProto, layers: list[Layer], ranges: Mapping[str, Ranges]) -> None:
    """Put pairs of QuantizeLinear and DequantizeLinear around layers of `model`, in place.

    `ranges` has every tensor that a layer asks for; a `KeyError` names one that it lacks.
    """
    _Quantizer(model.graph, ranges).run(layers)


class _Quantizer:
    """One graph, and the new nodes and weights on their way into it."""

    def __init__(self, graph: onnx.GraphProto, ranges: Mapping[str, Ranges]) -> None:
        self._graph = graph
        self._ranges = ranges
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._added: dict[str, onnx.TensorProto] = {}
        self._rounded: set[str] = set()

    def run(self, layers: list[Layer]) -> None:
        by_output = {layer.node.output[0]: layer for layer in layers}
        nodes: list[onnx.NodeProto] = []
        for node in self._graph.node:
            layer = by_output.get(node.output[0])
            nodes += [node] if layer is None else self._around(layer)
        replaced = {name for layer in layers for name in layer.node.input[1:]}
        kept = [tensor for name, tensor in self._weights.items() if name not in replaced]
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(nodes)
        self._graph.initializer.extend([*kept, *self._added.values()])

    def _around(self, layer: Layer) -> list[onnx.NodeProto]:
        """The nodes that stand in the place of a layer's."""
        node, entering = onnx.NodeProto(), layer.node.input[0]
        node.CopyFrom(layer.node)
        step, zero = uint8_step(self._ranges[entering])
        weight = numpy_helper.to_array(self._weights[layer.weight])
        values, scales = int8_by_channel(weight, layer.channel_axis)
        before, after = self._round_once(entering, step, zero), list[onnx.NodeProto]()
        node.input[0] = f"{entering}/rounded"
        if layer.is_convolution:
            steps, zeros = uint8_steps(HEADROOM * self._ranges[node.output[0]])
            before.append(self._shifted_bias(node, step * scales, steps, zeros))
            after = self._leave(node, steps, zeros)
            scales = scales / steps
        node.input[1] = f"{layer.weight}/float"
        before.append(self._dequantized(node.input[1], values, scales, axis=layer.channel_axis))
        return [*before, node, *after]

    def _round_once(self, tensor: str, step: np.float32, zero: np.uint8) -> list[onnx.NodeProto]:
        """Round a tensor to uint8 and back, once for all that read it."""
        if tensor in self._rounded:
            return []
        self._rounded.add(tensor)
        rounded = f"{tensor}/rounded"
        scale = [self._add(f"{rounded}/step", step), self._add(f"{rounded}/zero", zero)]
        return [
            _node("QuantizeLinear", [tensor, *scale], f"{rounded}/uint8"),
            _node("DequantizeLinear", [f"{rounded}/uint8", *scale], rounded),
        ]

    def _leave(
        self, node: onnx.NodeProto, steps: Floats, zeros: UInt8[np.ndarray, " channels"]
    ) -> list[onnx.NodeProto]:
        """A scale for each channel of a convolution's 8-bit output, though the kernel has but one.

        The convolution gives y / step + zero - 128 of its channel (by its weights' scales and its
        bias), which is rounded in steps of 1 around 128; then y is read with the channel's own
        step and zero.
        """
        leaving = node.output[0]
        node.output[0] = f"{leaving}/in_steps"
        one = [self._add("one", np.float32(1)), self._add("middle", np.uint8(_MIDDLE))]
        own = [self._add(f"{leaving}/step", steps), self._add(f"{leaving}/zero", zeros)]
        return [
            _node("QuantizeLinear", [node.output[0], *one], f"{leaving}/uint8"),
            _node("DequantizeLinear", [f"{leaving}/uint8", *own], leaving, axis=1),
        ]

    def _shifted_bias(
        self, node: onnx.NodeProto, units: Floats, steps: Floats, zeros: UInt8[np.ndarray, " _"]
    ) -> onnx.NodeProto:
        """The bias in `units`, in which an 8-bit kernel sums up, and the shift of `_leave`."""
        bias = np.zeros_like(steps)
        if len(node.input) > 2:
            bias = numpy_helper.to_array(self._weights[node.input.pop()])
        shifted = bias.astype(np.float64) + steps * (zeros.astype(np.float64) - _MIDDLE)
        values = np.clip(np.rint(shifted / units), -(2**31), 2**31 - 1).astype(np.int32)
        node.input.append(f"{node.output[0]}/bias")
        return self._dequantized(node.input[2], values, units / steps, axis=0)

    def _dequantized(
        self, name: str, values: np.ndarray, scales: Floats, *, axis: int
    ) -> onnx.NodeProto:
        inputs = [self._add(f"{name}/integer", values), self._add(f"{name}/scale", scales)]
        return _node("DequantizeLinear", inputs, name, axis=axis)

    def _add(self, name: str, value: np.generic | np.ndarray) -> str:
        self._added[name] = numpy_helper.from_array(np.asarray(value), name)
        return name


def uint8_steps(seen: Ranges) -> tuple[Floats, UInt8[np.ndarray, " channels"]]:
    """The step of a uint8 that covers each channel's range and 0, and the number that is 0."""
    low, high = np.minimum(seen[0], 0), np.maximum(seen[1], 0)
    span = high - low
    steps = np.where(span > 0, span / _LEVELS, 1.0).astype(np.float32)
    return steps, np.rint(-low / steps).astype(np.uint8)


def uint8_step(seen: Ranges) -> tuple[np.float32, np.uint8]:
    """The same for all channels together."""
    whole = np.array([[seen[0].min()], [seen[1].max()]], np.float32)
    steps, zeros = uint8_steps(whole)
    return steps[0], zeros[0]


def int8_by_channel(
    weight: Float32[np.ndarray, "..."], axis: int
) -> tuple[Int8[np.ndarray, "..."], Floats]:
    """Weights in steps of their channel's largest magnitude over 127, and these steps."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scales = np.where(largest > 0, largest / _LARGEST, 1.0).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales.reshape(-1)


def _node(
    op_type: str, inputs: list[str], output: str, *, axis: int | None = None
) -> onnx.NodeProto:
    name = f"{output}/{op_type}"
    return onnx.helper.make_node(op_type, inputs, [output], name=name, axis=axis)
