"""Changes to the graph of an ONNX model, with the `onnx` package alone: no PyTorch.

They make of graphs that other exporters wrote the ones that a bundle has (docs/bundle.md). A model
is changed in place; what its outputs no longer need is removed.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.errors import OneWordError

Axes = Sequence[int | str]  # a string names a dynamic axis

# Far below protobuf's limit of 2 GB: loading a large protobuf costs its size in memory once more.
EXTERNAL_DATA_BYTES = 512 << 20
_WRAPPERS = ("Unsqueeze", "Reshape", "Squeeze", "Cast", "Identity")


class SurgeryError(OneWordError):
    """A graph is not as the exporter is known to write it; says what was found."""


def cut_at_token_embedding(
    model: onnx.ModelProto, *, input_ids: str, embeds: str, eos_index: str, hidden: str, pooled: str
) -> np.ndarray:
    """Let a text encoder take embeddings and the position of EOS; returns its table [V, D].

    What looks its ids up becomes the input `embeds` [batch, positions, D]. Everything else that the
    graph wants of the ids is their shape, so zeros of that shape take their place. The output
    `pooled` is `hidden` at `eos_index` [batch]: an exported argmax over ids would find a new
    word's id, or an EOS that is not the end.
    """
    table_name, look_up = _look_up(model, input_ids)
    table = numpy_helper.to_array(_initializer(model, table_name))
    _redirect(model, look_up.output[0], embeds)
    zeros = "oneword/input_ids"
    _redirect(model, input_ids, zeros)
    head = [
        helper.make_node("Shape", [embeds], ["oneword/embeds_shape"]),
        _constant("oneword/zero", np.array([0], np.int64)),
        _constant("oneword/two", np.array([2], np.int64)),
        helper.make_node(
            "Slice", ["oneword/embeds_shape", "oneword/zero", "oneword/two"], ["oneword/ids_shape"]
        ),
        helper.make_node(
            "ConstantOfShape",
            ["oneword/ids_shape"],
            [zeros],
            value=numpy_helper.from_array(np.array([0], np.int64)),
        ),
    ]
    tail = [
        _constant("oneword/one", np.array([1], np.int64)),
        helper.make_node("Unsqueeze", [eos_index, "oneword/one"], ["oneword/eos_column"]),
        helper.make_node("GatherND", [hidden, "oneword/eos_column"], [pooled], batch_dims=1),
    ]
    _insert(model, head, tail)
    return table


def _look_up(model: onnx.ModelProto, input_ids: str) -> tuple[str, onnx.NodeProto]:
    """The Gather that takes rows of a matrix for the ids themselves, through reshapes at most."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    of_ids = _same_values(model, input_ids)
    found = [
        node
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.input[1] in of_ids
        and len(getattr(initializers.get(node.input[0]), "dims", ())) == 2
        and _attribute(node, "axis", 0) == 0
    ]
    if len(found) != 1:
        raise SurgeryError(
            f"the text encoder looks {input_ids!r} up in {len(found)} tables, it should do so in "
            "one; export it as optimum does, with the ids as its input"
        )
    return found[0].input[0], found[0]


def _same_values(model: onnx.ModelProto, name: str) -> set[str]:
    """The tensors that hold the same values in another shape."""
    found = {name}
    for node in model.graph.node:  # in topological order, as ONNX demands
        if node.op_type in _WRAPPERS and node.input[0] in found:
            found.update(node.output)
    return found


def make_timestep_a_row(model: onnx.ModelProto, timestep: str) -> None:
    """Let a denoiser that takes one timestep for all take one for each row, in float32.

    The exported chain makes a vector of the scalar and expands it to the batch: both go.
    """
    value = _input(model, timestep)
    rank = len(value.type.tensor_type.shape.dim)
    if rank > 1:
        raise SurgeryError(f"{timestep!r} has {rank} axes, a timestep is a scalar or a vector")
    name = timestep
    while True:
        users = [node for node in model.graph.node if name in node.input]
        if len(users) != 1:
            raise SurgeryError(
                f"{timestep!r} goes to {len(users)} nodes before it is expanded to the batch; this "
                "is not how optimum exports a UNet"
            )
        (node,) = users
        if node.op_type == "Expand":
            break
        if node.op_type not in _WRAPPERS:
            raise SurgeryError(
                f"{timestep!r} goes into {node.op_type} and is never expanded to the batch; this "
                "is not how optimum exports a UNet"
            )
        name = node.output[0]
    _redirect(model, node.output[0], timestep)


def take_scalar_as_vector(model: onnx.ModelProto, name: str) -> None:
    """Let a scalar input be given as a vector of one value, as runtimes here feed arrays."""
    value = _input(model, name)
    if len(value.type.tensor_type.shape.dim):
        return
    _redirect(model, name, f"{name}/scalar")
    value.type.tensor_type.shape.dim.add().dim_value = 1
    _insert(model, [helper.make_node("Squeeze", [name], [f"{name}/scalar"])], [])


def rename_tensor(model: onnx.ModelProto, old: str, new: str) -> None:
    """Give an input or output another name, wherever it is used."""
    if old == new:
        return
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    if new in names:  # of something inside
        rename_tensor(model, new, f"{new}/inside")
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new


def scale_input(model: onnx.ModelProto, name: str, *, factor: float, shift: float) -> None:
    """Feed the graph `name * factor + shift` in place of its input `name`."""
    _redirect(model, name, f"{name}/scaled")
    nodes = _scaled(name, f"{name}/scaled", factor=factor, shift=shift)
    _insert(model, nodes, [])


def split_posterior(
    model: onnx.ModelProto, name: str, *, channels: int, factor: float, shift: float
) -> None:
    """Give `mean` and `std` of a posterior for its parameters [batch, 2 channels, ...].

    mean' = (mean + shift) * factor, std' = exp(logvar / 2) * factor, with the logarithm of the
    variance between -30 and 20, as in diffusers' `DiagonalGaussianDistribution`.
    """
    bounds = {"start": 0, "middle": channels, "end": 2 * channels, "axis": 1}
    nodes = [_constant(f"oneword/{key}", np.array([v], np.int64)) for key, v in bounds.items()]
    cuts = {"mean": ("start", "middle"), "logvar": ("middle", "end")}
    for part, (first, last) in cuts.items():
        ends = [f"oneword/{first}", f"oneword/{last}", "oneword/axis"]
        nodes.append(helper.make_node("Slice", [name, *ends], [f"oneword/{part}"]))
    nodes += [
        *_scaled("oneword/mean", "mean", factor=factor, shift=shift * factor),
        _constant("oneword/lowest", np.array(-30.0, np.float32)),
        _constant("oneword/highest", np.array(20.0, np.float32)),
        helper.make_node(
            "Clip", ["oneword/logvar", "oneword/lowest", "oneword/highest"], ["oneword/clipped"]
        ),
        *_scaled("oneword/clipped", "oneword/log_std", factor=0.5, shift=0.0),
        helper.make_node("Exp", ["oneword/log_std"], ["oneword/std"]),
        *_scaled("oneword/std", "std", factor=factor, shift=0.0),
    ]
    _insert(model, [], nodes)


def _scaled(name: str, result: str, *, factor: float, shift: float) -> list[onnx.NodeProto]:
    return [
        _constant(f"{result}/factor", np.array(factor, np.float32)),
        _constant(f"{result}/shift", np.array(shift, np.float32)),
        helper.make_node("Mul", [name, f"{result}/factor"], [f"{result}/product"]),
        helper.make_node("Add", [f"{result}/product", f"{result}/shift"], [result]),
    ]


def set_interface(
    model: onnx.ModelProto,
    inputs: Mapping[str, tuple[int, Axes]],
    outputs: Mapping[str, tuple[int, Axes]],
) -> None:
    """Declare inputs and outputs (element type, axes), remove what no output needs, and check.

    Raises `SurgeryError` where the graph that comes out is none.
    """
    graph = model.graph
    for side, wanted in ((graph.input, inputs), (graph.output, outputs)):
        del side[:]
        side.extend(
            helper.make_tensor_value_info(name, kind, list(axes))
            for name, (kind, axes) in wanted.items()
        )
    del graph.value_info[:]  # of before: shapes and types may have changed
    remove_unused(graph)
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # onnx raises classes of its own, with no common one
        raise SurgeryError(f"the changed graph is not sound: {error}") from error


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, with its weights in `NAME.onnx.data` beside it if they are large."""
    external = sum(len(t.raw_data) for t in model.graph.initializer) > EXTERNAL_DATA_BYTES
    location = f"{path.name}.data" if external else None
    onnx.save_model(model, path, save_as_external_data=external, location=location)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Drop nodes and weights that no output depends on."""
    needed = {tensor.name for tensor in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            needed.update(_outer_names(node))
    kept.reverse()
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:]
    graph.node.extend(kept)
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _outer_names(node: onnx.NodeProto) -> set[str]:
    """What the subgraphs of a node (If, Loop) use of the graph around them, and more."""
    return {
        name
        for attribute in node.attribute
        for graph in (attribute.g, *attribute.graphs)
        for inner in graph.node
        for name in (*inner.input, *_outer_names(inner))
    }


def _insert(
    model: onnx.ModelProto, head: Sequence[onnx.NodeProto], tail: Sequence[onnx.NodeProto]
) -> None:
    nodes = [*head, *model.graph.node, *tail]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _redirect(model: onnx.ModelProto, old: str, new: str) -> None:
    """Let all that reads `old` read `new`."""
    for node in model.graph.node:
        if old in _outer_names(node):
            raise SurgeryError(f"{old!r} is used inside of a {node.op_type}, which is not read")
        node.input[:] = [new if name == old else name for name in node.input]


def _constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def _input(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    for value in model.graph.input:
        if value.name == name:
            return value
    names = ", ".join(value.name for value in model.graph.input)
    raise SurgeryError(f"there is no input {name!r}; the graph takes {names}")


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((one.i for one in node.attribute if one.name == name), default)


def interface(values: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[int | str]]]:
    """Element type and axes of inputs or outputs, by name; an axis without a name is ''."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value or "" for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
