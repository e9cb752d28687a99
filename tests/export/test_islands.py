"""Float16 bundles of models that do not bear it everywhere, and weights that were spoiled."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.bundle import Bundle
from engine.sessions import OnnxSession
from tests.export_setup import build
from tests.tiny_model import make_tiny_model
from trainer.activations import FLOAT16_MAX, HEADROOM, largest_activation
from trainer.component_memory import Residence
from trainer.export import BuildReport
from trainer.model import load_model
from trainer.onnx_graphs import export_graph, graphs_of
from trainer.parity import ParityError, check_component, component_errors, measure_image

# Its first convolution then gives up to 2e5; float16 ends at 65504. Norms bring it down later.
FACTOR = 1e5


def scale(model: Path, weight: str, factor: float) -> None:
    """Multiply one weight of a model's VAE, and the bias beside it."""
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in (weight, weight.replace(".weight", ".bias")):
        tensors[name] = tensors[name] * factor
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose VAE decoder overflows in float16, and whose config says that it does not."""
    model = make_tiny_model(tmp_path_factory.mktemp("models") / "overflowing", force_upcast=False)
    scale(model, "decoder.conv_in.weight", FACTOR)
    return model


def test_a_component_that_overflows_is_a_float32_island(overflowing: Path, tmp_path: Path) -> None:
    report = build(overflowing, tmp_path / "bundle", precision="fp16")
    found = {name: spec.precision for name, spec in report.manifest.components.items()}
    assert found == {
        "text_encoder": "fp16",
        "denoiser": "fp16",
        "vae_decoder": "fp32",
        "vae_encoder": "fp16",
    }
    decoder = report.manifest.components["vae_decoder"]
    assert {tensor.dtype for tensor in (*decoder.inputs, *decoder.outputs)} == {"float32"}
    recorded = json.loads((report.path / "parity.json").read_text())
    (reason,) = recorded["float32_islands"].values()
    assert re.search(
        r"numbers reach \d\.\d*e\+05 in vae\.decoder\.\S+; float16 ends at 65504", reason
    )
    assert recorded["precision"] == found
    # Measured again, and held to the limit of float32.
    assert recorded["limits"]["max_relative_error"]["vae_decoder"] == 1e-4
    assert 0 < recorded["max_relative_error"]["vae_decoder"]["images"] < 1e-4
    assert recorded["image_psnr_db"] > 50


def test_a_config_that_speaks_of_overflow_is_not_believed_unseen(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", force_upcast=True)
    report = build(model, tmp_path / "bundle", precision="fp16")
    assert {spec.precision for spec in report.manifest.components.values()} == {"fp16"}
    assert report.parity is not None and report.parity.float32_islands == {}


def test_float32_bundles_have_no_islands(report: BuildReport) -> None:
    assert {spec.precision for spec in report.manifest.components.values()} == {"fp32"}
    assert report.parity is not None and report.parity.float32_islands == {}


def test_the_largest_activation_is_found_where_it_is(overflowing: Path) -> None:
    graph = next(g for g in graphs_of(load_model(overflowing)) if g.name == "vae_decoder")
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = list[float]()
    convolution = graph.module.get_submodule("vae.decoder.conv_in")
    hook = convolution.register_forward_hook(lambda _m, _i, y: seen.append(float(y.abs().max())))
    with torch.no_grad(), largest_activation(graph.module) as largest:
        graph.module(latents)
    hook.remove()
    assert largest().value >= seen[0] > FLOAT16_MAX / HEADROOM
    assert not largest().fits_float16


def test_scores_inside_attention_count() -> None:
    """The operator does not give them away; in the exported graph they are a tensor."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    module, x = Attention(), 300 * torch.ones(1, 1, 4, 16)
    with torch.no_grad(), largest_activation(module) as largest:
        module(x)
    # All products are 16 x 300 x 300, over the root of 16.
    assert largest().value == pytest.approx(4 * 300**2, rel=1e-5)


@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "vae_decoder", "vae_encoder"])
def test_a_spoiled_weight_is_found_in_its_component(
    tiny_model: Path, tmp_path: Path, component: str
) -> None:
    graph = next(g for g in graphs_of(load_model(tiny_model)) if g.name == component)
    file = tmp_path / export_graph(graph, tmp_path, precision="fp32").file
    check_component(graph, component_errors(graph, OnnxSession(file)), "fp32")
    spoil(file)
    with pytest.raises(ParityError, match=rf"{component}/\w+ is off by \d\.\de-\d\d of its range"):
        check_component(graph, component_errors(graph, OnnxSession(file)), "fp32")


def spoil(file: Path) -> None:
    """Turn the sign of one unit of the largest weight."""
    model = onnx.load(file)
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values[..., 0] *= -1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, file)


def test_a_spoiled_table_is_found_in_the_image(
    report: BuildReport, tiny_model: Path, tmp_path: Path
) -> None:
    """Of what no component's graph contains, the whole image speaks."""
    bundle, model = Bundle.open(report.path), load_model(tiny_model)
    sound = measure_image(bundle, model, Residence())
    assert sound > 55
    shuffled = np.roll(bundle.token_embedding, 1, axis=0)
    spoiled = dataclasses.replace(bundle, token_embedding=shuffled)
    assert measure_image(spoiled, model, Residence()) < sound - 3
