"""Graphs that are traced without their weights, and the weights that are written afterwards."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from engine.sessions import OnnxSession
from trainer.weightless import trace_without_weights, write_with_weights


class Layers(nn.Module):
    """Each way in which a graph has a weight: as it is, transposed, with axes added, not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 40)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("shift", torch.rand(40), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.convolution(x))
        return self.linear(y.flatten(2).transpose(1, 2)) + self.shift


EXAMPLE = (torch.zeros(2, 4, 5, 3),)
INPUTS = {"x": {0: "batch", 2: "height", 3: "width"}}


@pytest.fixture
def layers() -> Layers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Layers().requires_grad_(False).eval()


@pytest.mark.parametrize("external_data_bytes", [0, 1 << 20])
@pytest.mark.parametrize("half", [False, True])
def test_the_graph_computes_what_the_module_computes(
    layers: Layers, tmp_path: Path, half: bool, external_data_bytes: int
) -> None:
    example = tuple(x.half() if half else x for x in EXAMPLE)
    model, weights = trace_without_weights(
        layers, example, tmp_path / "traced.onnx", inputs=INPUTS, outputs=["y"], half=half
    )
    file = tmp_path / "graph.onnx"
    write_with_weights(model, weights, file, external_data_bytes=external_data_bytes)
    x = torch.randn(3, 4, 7, 6, generator=torch.Generator().manual_seed(1))
    found = OnnxSession(file).run({"x": x.numpy()})["y"]
    assert found.dtype == (np.float16 if half else np.float32)
    # Roundings of values of about 1; of float16 several, in a row.
    np.testing.assert_allclose(found, layers(x).numpy(), atol=5e-3 if half else 1e-5)
    assert layers.linear.weight.dtype == torch.float32
    assert not any("unused" in tensor.name for tensor in onnx.load(file).graph.initializer)


def test_no_weight_is_read_before_it_is_written(layers: Layers, tmp_path: Path) -> None:
    """On the meta device there are no numbers that could be read."""
    expected, _ = trace_without_weights(
        layers, EXAMPLE, tmp_path / "a.onnx", inputs=INPUTS, outputs=["y"], half=False
    )
    hollow, weights = trace_without_weights(
        layers.to("meta"), EXAMPLE, tmp_path / "b.onnx", inputs=INPUTS, outputs=["y"], half=False
    )
    assert hollow.SerializeToString() == expected.SerializeToString()
    with pytest.raises(TypeError, match="meta device"):
        write_with_weights(hollow, weights, tmp_path / "c.onnx", external_data_bytes=0)


def test_linear_layers_have_their_weights_ready_for_the_product(
    layers: Layers, tmp_path: Path
) -> None:
    model, weights = trace_without_weights(
        layers, EXAMPLE, tmp_path / "traced.onnx", inputs=INPUTS, outputs=["y"], half=False
    )
    file = tmp_path / "graph.onnx"
    write_with_weights(model, weights, file, external_data_bytes=0)
    structure = onnx.load(file, load_external_data=False)
    products = [node for node in structure.graph.node if node.op_type == "MatMul"]
    tensors = {tensor.name: tensor for tensor in structure.graph.initializer}
    (weight,) = (tensors[node.input[1]] for node in products)
    assert list(weight.dims) == [8, 40]
    places = {entry.key: entry.value for entry in weight.external_data}
    assert places["location"] == "graph.onnx.data" and int(places["offset"]) % 4096 == 0
    loaded = {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
    np.testing.assert_array_equal(
        numpy_helper.to_array(loaded[weight.name]), layers.linear.weight.numpy().T
    )
    # What is small is inside, where shapes are read from.
    assert all(t.data_location != t.EXTERNAL for t in tensors.values() if np.prod(t.dims) < 256)
