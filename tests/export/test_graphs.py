"""The graphs of a bundle: what is folded in, what stays dynamic, what stays float32."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from engine.sessions import OnnxSession
from tests.conftest import EMOJI_MODEL
from tests.tiny_model import make_tiny_model
from trainer.export import BuildReport
from trainer.model import load_model
from trainer.onnx_graphs import (
    ExportError,
    Graph,
    VaeDecoder,
    VaeEncoder,
    _check_inputs,
    export_graph,
    graphs_of,
)
from trainer.parity import ParityError, component_errors
from trainer.previews import FINE, fit_latent_rgb, shrunken


def test_a_vae_that_overflows_stays_float32_in_a_float16_bundle(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path / "model", force_upcast=True))
    graph = next(graph for graph in graphs_of(model) if graph.name == "vae_decoder")
    spec = export_graph(graph, tmp_path, precision="fp16")
    assert [tensor.dtype for tensor in (*spec.inputs, *spec.outputs)] == ["float32", "float32"]


def test_scaling_and_shift_are_folded_into_the_autoencoder(tiny_model: Path) -> None:
    vae = load_model(tiny_model).vae
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 4, 6, 10, generator=generator)
    images = torch.rand(2, 3, 16, 8, generator=generator) * 2 - 1
    with torch.no_grad():
        decoded = VaeDecoder(vae, 0.3, 0.7)(latents)
        # As diffusers' pipelines with a shifted VAE do (Stable Diffusion 3): z / scale + shift.
        decode: Any = vae.decode
        torch.testing.assert_close(decoded, decode(latents / 0.3 + 0.7).sample)
        mean, std = VaeEncoder(vae, 0.3, 0.7)(images)
        posterior: Any = vae.encode(images, return_dict=False)[0]
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
        sample = posterior.sample(generator=torch.Generator().manual_seed(5))
    # Two roundings of values around 1.
    torch.testing.assert_close(mean + std * noise, (sample - 0.7) * 0.3, rtol=1e-5, atol=1e-6)


def test_external_weights_give_the_same_graph(tiny_model: Path, tmp_path: Path) -> None:
    graph = graphs_of(load_model(tiny_model))[0]
    spec = export_graph(graph, tmp_path, precision="fp32", external_data_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {spec.file, f"{spec.file}.data"}
    assert (tmp_path / spec.file).stat().st_size < (tmp_path / f"{spec.file}.data").stat().st_size
    errors = component_errors(graph, OnnxSession(tmp_path / spec.file))
    assert max(errors.values()) < 1e-5


def test_a_frozen_input_axis_is_refused(report: BuildReport, tiny_model: Path) -> None:
    graph = next(g for g in graphs_of(load_model(tiny_model)) if g.name == "vae_decoder")
    model = onnx.load(report.path / "vae_decoder.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(ExportError, match=r"takes \{'latents': \(2, 4.*must take .*'batch'"):
        _check_inputs(graph, model)


class FrozenBatch(nn.Module):
    """Declares a dynamic batch and reshapes to the one it was traced with."""

    def forward(self, latents: Tensor) -> Tensor:
        return latents.reshape(int(latents.shape[0]), -1).sum(1)


def test_an_axis_frozen_inside_a_graph_is_found_by_the_gate(tmp_path: Path) -> None:
    graph = Graph(
        name="frozen",
        module=FrozenBatch(),
        inputs={"latents": ("batch", 4)},
        outputs={"sums": ("batch",)},
        size_multiple=1,
        max_tokens=8,
    )
    spec = export_graph(graph, tmp_path, precision="fp32")
    with pytest.raises(ParityError, match=r"frozen\.onnx does not run at .*'batch': 1"):
        component_errors(graph, OnnxSession(tmp_path / spec.file))


def test_previews_explain_most_of_what_the_decoder_draws() -> None:
    model = load_model(EMOJI_MODEL)
    weights = fit_latent_rgb(model, seed=0)
    channels = model.vae.config["latent_channels"]
    coarse = torch.randn(4, channels, 4, 4, generator=torch.Generator().manual_seed(99))
    latents = nn.functional.interpolate(coarse, (FINE, FINE), mode="bicubic")
    with torch.no_grad():
        decoder = VaeDecoder(model.vae, model.scaling_factor, model.shift_factor)
        expected = shrunken(decoder(latents), FINE).numpy()
    found = np.tensordot(weights[:-1].T, latents.numpy(), axes=(1, 1)).swapaxes(0, 1)
    found += weights[-1][:, None, None]
    residual = ((found - expected) ** 2).mean()
    variance = ((expected - expected.mean((0, 2, 3), keepdims=True)) ** 2).mean()
    # Other latents than those fitted to; a map that says nothing leaves all of the variance.
    assert residual < 0.15 * variance
