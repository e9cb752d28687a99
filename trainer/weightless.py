"""A graph traced without its weights, which are then written one at a time.

The exporter copies weights: into its own graph, transposed for every linear layer, into the file
and out of it again. So they are inputs of what is traced, zeros that all lie in the same memory;
in the file those inputs become initializers.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

OPSET_VERSION = 18
# A smaller tensor is always inside the graph: shapes and scales are read from there.
_SMALL_BYTES = 1024
_ALIGNMENT = 4096  # of weights in a file of their own, so that they can be mapped into memory
_DATA_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int64: onnx.TensorProto.INT64,
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a module and what the graph has of it: transposed, or with axes added."""

    tensor: Tensor
    dtype: torch.dtype
    perm: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def read(self) -> Tensor:
        """The numbers, contiguous."""
        tensor = self.tensor.detach().to(self.dtype)
        if self.perm:
            tensor = tensor.permute(self.perm)
        return tensor.reshape(self.shape).contiguous()

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


class _Weightless(nn.Module):
    """A module whose weights are arguments after its own."""

    def __init__(self, module: nn.Module, num_inputs: int) -> None:
        super().__init__()
        self.module, self._num_inputs = module, num_inputs
        self._slots = _slots(module)
        self._fill((None,) * len(self._slots))

    def forward(self, *arguments: Tensor) -> Any:
        self._fill(arguments[self._num_inputs :])
        try:
            return self.module(*arguments[: self._num_inputs])
        finally:
            self._fill((None,) * len(self._slots))

    def _fill(self, tensors: tuple[Tensor | None, ...]) -> None:
        for (_, table, name), tensor in zip(self._slots, tensors, strict=True):
            table[name] = tensor


def _slots(module: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """Where a module keeps each parameter and buffer: its path, a table, the name in it."""
    return [
        (f"{path}.{name}" if path else name, table, name)
        for path, part in module.named_modules()
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def trace_without_weights(
    module: nn.Module,
    example: tuple[Tensor, ...],
    file: Path,
    *,
    inputs: dict[str, dict[int, str]],
    outputs: list[str],
    half: bool,
) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """The graph of a module, its initializers without data, and where their data is.

    `inputs` are names with their dynamic axes; `file` is written on the way. `half` makes the graph
    of `module.half()`, which stays as it is.
    """
    weights = {
        path: Weight(tensor, torch.float16 if half and tensor.is_floating_point() else tensor.dtype)
        for path, table, name in _slots(module)
        for tensor in (table[name],)
    }
    hollow = _hollow(weights)
    memo = {id(weight.tensor): hollow[name] for name, weight in weights.items()}
    shell = _Weightless(copy.deepcopy(module, memo), len(example))
    with torch.no_grad(), _without_tracer_warnings():
        torch.onnx.export(
            shell,
            (*example, *hollow.values()),
            str(file),
            input_names=[*inputs, *hollow],
            output_names=outputs,
            dynamic_axes=inputs,
            opset_version=OPSET_VERSION,
            dynamo=False,
        )
    model = onnx.load(file)
    taken = _fold(model.graph, weights)
    kept = [tensor for tensor in model.graph.input if tensor.name in inputs]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model, taken


def _hollow(weights: dict[str, Weight]) -> dict[str, Tensor]:
    """Zeros in the shapes of weights, all in the same memory.

    A single number shown everywhere would need less, but PyTorch's float16 products on a CPU take
    13 times as long with it as with a contiguous matrix (1280 x 1280, AMD EPYC).
    """
    sizes: dict[torch.dtype, int] = {}
    for weight in weights.values():
        sizes[weight.dtype] = max(sizes.get(weight.dtype, 0), weight.tensor.numel())
    shared = {dtype: torch.zeros(size, dtype=dtype) for dtype, size in sizes.items()}
    return {
        name: shared[weight.dtype][: weight.tensor.numel()].view(weight.tensor.shape)
        for name, weight in weights.items()
    }


def _fold(graph: onnx.GraphProto, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Make initializers, without data, of the weights that the graph reads; transpose them here.

    What only gives a weight another shape would be computed at every start, beside a second copy.
    """
    weights = {
        name: Weight(one.tensor, one.dtype, shape=tuple(one.tensor.shape))
        for name, one in weights.items()
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        folded = _folded(node, weights, constants)
        if folded is None:
            nodes.append(node)
        else:
            weights[node.output[0]] = folded
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {t.name for t in graph.output}
    taken = {name: weight for name, weight in weights.items() if name in read}
    for name, weight in taken.items():
        data_type = _DATA_TYPES[weight.dtype]
        graph.initializer.append(
            onnx.TensorProto(name=name, dims=weight.shape, data_type=data_type)
        )
    return taken


def _folded(
    node: onnx.NodeProto, weights: dict[str, Weight], constants: dict[str, onnx.TensorProto]
) -> Weight | None:
    """What a node makes of a weight, where that is the weight in another shape."""
    weight = weights.get(node.input[0]) if node.input else None
    if weight is None or weight.perm or weight.shape != tuple(weight.tensor.shape):
        return None
    if node.op_type == "Transpose":
        perm = tuple(node.attribute[0].ints)
        shape = tuple(weight.shape[axis] for axis in perm)
        return Weight(weight.tensor, weight.dtype, perm=perm, shape=shape)
    if node.op_type == "Unsqueeze" and (axes := constants.get(node.input[1])) is not None:
        added = onnx.numpy_helper.to_array(axes).reshape(-1).tolist()
        rank = len(weight.shape) + len(added)
        places = {axis % rank for axis in added}
        sizes = iter(weight.shape)
        shape = tuple(1 if axis in places else next(sizes) for axis in range(rank))
        return Weight(weight.tensor, weight.dtype, shape=shape)
    return None


def write_with_weights(
    model: onnx.ModelProto, weights: dict[str, Weight], path: Path, *, external_data_bytes: int
) -> None:
    """Write what `trace_without_weights` gave, with the weights beside it if they exceed the limit.

    One weight at a time is in memory, where they are beside it.
    """
    missing = [tensor for tensor in model.graph.initializer if tensor.name in weights]
    sizes = [weights[tensor.name].num_bytes for tensor in missing]
    if sum(sizes) <= external_data_bytes:
        for tensor in missing:
            tensor.raw_data = _bytes(weights[tensor.name].read())
        onnx.save_model(model, path)
        return
    location = f"{path.name}.data"
    with path.with_name(location).open("wb") as file:
        for tensor, size in zip(missing, sizes, strict=True):
            data = _bytes(weights[tensor.name].read())
            if size < _SMALL_BYTES:
                tensor.raw_data = bytes(data)
                continue
            file.seek(math.ceil(file.tell() / _ALIGNMENT) * _ALIGNMENT)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entries = {"location": location, "offset": file.tell(), "length": size}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(data)
    onnx.save_model(model, path)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def _without_tracer_warnings() -> Generator[None]:
    """Silence what the exporter says of itself; the parity gate is what finds a wrong trace."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding", category=UserWarning)
        yield
