"""Attention as one node of a graph, which ONNX Runtime's CPU kernel computes block by block.

PyTorch's exporter writes `softmax(q k^T) v` out: at 512 px a Stable Diffusion 1.5 UNet then stores
and reads tables of 16 x 4096 x 4096 numbers. `com.microsoft.MultiHeadAttention` keeps a block of
them in the cache (FlashAttention, Dao et al. 2022, arXiv 2205.14135; onnxruntime PR 20805).
docs/cpu-backend.md has the figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from trainer.onnx_surgery import remove_unused

DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]  # [batch, tokens, heads, dim] -> [batch, heads, tokens, dim]
_TRANSPOSED_KEYS = [0, 2, 3, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """One `softmax(q k^T) v` in a graph: tensors [batch, tokens, heads * dim]."""

    query: str
    key: str
    value: str
    heads: int
    output: str
    last: onnx.NodeProto  # gives `output`


def fuse_attention(model: onnx.ModelProto) -> int:
    """Put one `MultiHeadAttention` in the place of each attention without a mask; how many.

    The scale is the operator's own, 1 / sqrt(dim), as in PyTorch; what differs from that or from
    the exporter's pattern is caught by the parity gate or left as it is.
    """
    graph = model.graph
    found = list(_find(_Links(graph)))
    for attention in found:
        fused = onnx.helper.make_node(
            "MultiHeadAttention",
            [attention.query, attention.key, attention.value],
            [attention.output],
            name=f"{attention.last.name}/attention",
            domain=DOMAIN,
            num_heads=attention.heads,
        )
        attention.last.CopyFrom(fused)
    if found:
        remove_unused(graph)
        if DOMAIN not in {opset.domain for opset in model.opset_import}:
            model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return len(found)


class _Links:
    """Who makes a tensor, who reads it, and the constants."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self._weights = {tensor.name: tensor for tensor in graph.initializer}

    def above(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node of this kind that makes a tensor."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == op_type else None

    def below(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node of this kind that alone reads a tensor."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None

    def integer(self, name: str) -> int | None:
        """A constant of one integer."""
        tensor = self._weights.get(name)
        node = self.above(name, "Constant")
        if tensor is None and node is not None:
            tensor = node.attribute[0].t
        if tensor is None:
            return None
        array = numpy_helper.to_array(tensor)
        return int(array.item()) if array.size == 1 and array.dtype == np.int64 else None


def _find(links: _Links) -> Iterator[_Attention]:
    for node in links.nodes:
        if node.op_type == "Softmax":
            attention = _match(links, node)
            if attention is not None:
                yield attention


def _match(links: _Links, softmax: onnx.NodeProto) -> _Attention | None:
    """The attention around a softmax, if it is the exporter's and nothing is added to the scores.

    Reshape -> Transpose -> Mul of queries and of keys, MatMul, Softmax, MatMul with
    Reshape -> Transpose of values, Transpose, Reshape.
    """
    scores = links.above(softmax.input[0], "MatMul")
    mixed = links.below(softmax.output[0], "MatMul")
    if scores is None or mixed is None:
        return None
    query = _scaled_heads(links, scores.input[0], _HEADS_FIRST)
    key = _scaled_heads(links, scores.input[1], _TRANSPOSED_KEYS)
    value = _heads(links, mixed.input[1], _HEADS_FIRST)
    swapped = links.below(mixed.output[0], "Transpose")
    joined = swapped and links.below(swapped.output[0], "Reshape")
    if query is None or key is None or value is None or not swapped or not joined:
        return None
    if query[1] != key[1] or query[1] != value[1] or _perm(swapped) != _HEADS_FIRST:
        return None
    return _Attention(
        query=query[0],
        key=key[0],
        value=value[0],
        heads=query[1],
        output=joined.output[0],
        last=joined,
    )


def _scaled_heads(links: _Links, name: str, perm: list[int]) -> tuple[str, int] | None:
    scaled = links.above(name, "Mul")
    return scaled and _heads(links, scaled.input[0], perm)


def _heads(links: _Links, name: str, perm: list[int]) -> tuple[str, int] | None:
    """The tensor [batch, tokens, heads * dim] behind one with its heads apart, and their number."""
    transposed = links.above(name, "Transpose")
    split = transposed and links.above(transposed.input[0], "Reshape")
    shape = split and links.above(split.input[1], "Concat")
    if not transposed or not split or not shape:
        return None
    if _perm(transposed) != perm or len(shape.input) != 4:
        return None
    heads = links.integer(shape.input[2])
    return None if heads is None else (split.input[0], heads)


def _perm(transpose: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in transpose.attribute if a.name == "perm"), [])
