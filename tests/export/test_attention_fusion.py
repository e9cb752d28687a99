"""Attention as one node: the same numbers as PyTorch's, only where the operator means the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engine.sessions import OnnxSession
from tests.export_setup import build
from trainer.attention_fusion import DOMAIN, fuse_attention
from trainer.export import BuildReport
from trainer.model import load_model
from trainer.onnx_graphs import Graph, export_graph, graphs_of
from trainer.onnx_surgery import remove_unused
from trainer.parity import component_errors


def _graph(model: Path, name: str) -> Graph:
    return next(graph for graph in graphs_of(load_model(model)) if graph.name == name)


def _kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", ["denoiser", "vae_decoder", "vae_encoder"])
def test_every_attention_is_fused_and_computes_what_pytorch_does(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    graph = _graph(tiny_model, name)
    spec = export_graph(graph, tmp_path, precision="fp32")
    written_out = _kinds(tmp_path / spec.file)
    export_graph(graph, tmp_path, precision="fp32", fused_attention=True)
    fused = _kinds(tmp_path / spec.file)
    assert fused["MultiHeadAttention"] == written_out["Softmax"] > 0
    assert fused["Softmax"] == 0
    # As without fusion: float32 sums in another order, over batches and sizes of several kinds.
    assert max(component_errors(graph, OnnxSession(tmp_path / spec.file)).values()) < 1e-5


def test_attention_with_a_mask_is_left_as_it_is(report: BuildReport) -> None:
    """A text encoder adds its causal mask to the scores."""
    model = onnx.load(report.path / "text_encoder.onnx")
    before = model.SerializeToString()
    assert Counter(node.op_type for node in model.graph.node)["Softmax"] > 0
    assert fuse_attention(model) == 0
    assert model.SerializeToString() == before


def test_wrong_heads_would_be_noticed(tiny_model: Path, tmp_path: Path) -> None:
    graph = _graph(tiny_model, "denoiser")
    spec = export_graph(graph, tmp_path, precision="fp32", fused_attention=True)
    model = onnx.load(tmp_path / spec.file)
    for node in model.graph.node:
        if node.op_type == "MultiHeadAttention":
            node.attribute[0].i = 1 if node.attribute[0].i > 1 else 2
    onnx.save(model, tmp_path / spec.file)
    assert max(component_errors(graph, OnnxSession(tmp_path / spec.file)).values()) > 1e-4


def test_bundles_in_float16_and_what_tensorrt_compiles_are_standard_onnx(
    tiny_model: Path, report: BuildReport, tmp_path: Path
) -> None:
    half = build(tiny_model, tmp_path / "half", precision="fp16")
    for file in half.path.glob("*.onnx"):
        assert {opset.domain for opset in onnx.load(file).opset_import} == {""}
    assert DOMAIN in {o.domain for o in onnx.load(report.path / "denoiser.onnx").opset_import}
    # As trainer.compile_plans exports a float32 VAE for a plan.
    spec = export_graph(_graph(tiny_model, "vae_decoder"), tmp_path, precision="fp32")
    assert {opset.domain for opset in onnx.load(tmp_path / spec.file).opset_import} == {""}


def test_dead_nodes_go_with_their_weights() -> None:
    tensors = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in "xy"]
    weights = [numpy_helper.from_array(np.ones(2, np.float32), name) for name in ("used", "lost")]
    nodes = [
        onnx.helper.make_node("Mul", ["x", "lost"], ["dead"]),
        onnx.helper.make_node("Neg", ["dead"], ["deader"]),
        onnx.helper.make_node("Add", ["x", "used"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", tensors[:1], tensors[1:], weights)
    remove_unused(graph)
    assert [node.op_type for node in graph.node] == ["Add"]
    assert [tensor.name for tensor in graph.initializer] == ["used"]
