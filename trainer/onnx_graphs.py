"""The ONNX graphs of a bundle: their modules, their axes, and the export of one of them.

Exported by the TorchScript-based exporter (`dynamo=False`): on the embedded model it takes 1 s
where the dynamo exporter takes 34 s, on Stable Diffusion 1.5's UNet 93 s instead of 164 s, and ONNX
Runtime runs both graphs equally fast. docs/bundle.md has the figures.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from engine.bundle import ComponentSpec, TensorSpec
from engine.errors import OneWordError
from engine.families import NUM_TIME_IDS
from trainer.attention_fusion import fuse_attention
from trainer.model import DiffusionModel, Encoder
from trainer.onnx_surgery import EXTERNAL_DATA_BYTES
from trainer.weightless import Weight, trace_without_weights, write_with_weights

Axes = tuple[int | str, ...]  # a string names a dynamic axis


class ExportError(OneWordError):
    """The bundle cannot be built, or is not right; nothing was published."""


class Denoiser(nn.Module):
    """The UNet, with one timestep for each row and nothing else beside latents and prompt."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latents: Float[Tensor, "rows channels height width"],
        timestep: Float[Tensor, " rows"],
        prompt_embeds: Float[Tensor, "rows tokens dim"],
    ) -> Float[Tensor, "rows channels height width"]:
        return self.unet(latents, timestep, prompt_embeds, return_dict=False)[0]


class AddedInputsDenoiser(nn.Module):
    """A UNet that takes the pooled prompt and the size of the picture as well, as SDXL's does."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latents: Float[Tensor, "rows channels height width"],
        timestep: Float[Tensor, " rows"],
        prompt_embeds: Float[Tensor, "rows tokens dim"],
        text_embeds: Float[Tensor, "rows pooled_dim"],
        time_ids: Float[Tensor, "rows 6"],
    ) -> Float[Tensor, "rows channels height width"]:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(
            latents, timestep, prompt_embeds, added_cond_kwargs=added, return_dict=False
        )[0]


class VaeDecoder(nn.Module):
    """Denoiser latents -> images in [-1, 1]; scaling and shift are folded in."""

    def __init__(self, vae: AutoencoderKL, scaling_factor: float, shift_factor: float) -> None:
        super().__init__()
        self.vae, self.scaling_factor, self.shift_factor = vae, scaling_factor, shift_factor

    def forward(
        self, latents: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        vae_latents = latents / self.scaling_factor + self.shift_factor
        decode: Any = self.vae.decode
        return decode(vae_latents, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """Images in [-1, 1] -> mean and standard deviation of the posterior, as denoiser latents.

    The noise of `latents = mean + std * noise` stays outside: it belongs to the request's seed.
    """

    def __init__(self, vae: AutoencoderKL, scaling_factor: float, shift_factor: float) -> None:
        super().__init__()
        self.vae, self.scaling_factor, self.shift_factor = vae, scaling_factor, shift_factor

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[
        Float[Tensor, "batch channels latent_height latent_width"],
        Float[Tensor, "batch channels latent_height latent_width"],
    ]:
        posterior = self.vae.encode(images, return_dict=False)[0]
        mean = (posterior.mean - self.shift_factor) * self.scaling_factor
        return mean, posterior.std * self.scaling_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One component of a bundle: a float32 module, and what its inputs and outputs are called."""

    name: str
    module: nn.Module
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]
    size_multiple: int  # heights and widths that the graph takes are multiples of this
    max_tokens: int
    # A multiple to trace with, where the graph takes smaller ones than images have: float16
    # convolutions take a CPU seconds each.
    traced_multiple: int | None = None
    float32_inputs: tuple[str, ...] = ()  # stay float32 in a float16 graph
    needs_float32: bool = False  # overflows in float16
    bears_int8: bool = False  # what most of the time is spent in

    def precision(self, precision: str) -> str:
        """The precision inside this graph, in a bundle of `precision`."""
        stays = not self.bears_int8 if precision == "int8" else self.needs_float32
        return "fp32" if stays else precision

    def random_inputs(self, sizes: dict[str, int], seed: int) -> tuple[Tensor, ...]:
        """Float32 inputs of the right kind, with the dynamic axes as long as `sizes` says."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            self._random(name, [sizes[a] if isinstance(a, str) else a for a in axes], generator)
            for name, axes in self.inputs.items()
        )

    def _random(self, name: str, shape: list[int], generator: torch.Generator) -> Tensor:
        if name == "eos_index":
            return torch.randint(1, self.max_tokens, shape, generator=generator)
        if name == "timestep":
            return torch.rand(shape, generator=generator) * 999
        if name == "time_ids":
            return torch.randint(0, 1025, shape, generator=generator).float()
        if name == "images":
            return torch.rand(shape, generator=generator) * 2 - 1
        return torch.randn(shape, generator=generator)


def size_multiple(unet: UNet2DConditionModel) -> int:
    """Heights and widths of latents must be multiples of this for the UNet's skips to meet."""
    return 2 ** (len(unet.config["block_out_channels"]) - 1)


def graphs_of(model: DiffusionModel) -> list[Graph]:
    """The graphs of a model, around its own modules."""
    channels = int(model.unet.config["in_channels"])
    tokens = model.max_tokens
    text_encoders = [_text_encoder_graph(encoder) for encoder in model.encoders]
    multiple = size_multiple(model.unet)
    scaling = (model.scaling_factor, model.shift_factor)
    latents = ("batch", channels, "height", "width")
    posterior = ("batch", channels, "latent_height", "latent_width")
    vae_needs_float32 = bool(model.vae.config.get("force_upcast", True))
    return [
        *text_encoders,
        _denoiser_graph(model, text_encoders[-1].outputs["pooled"][-1]),
        Graph(
            name="vae_decoder",
            module=VaeDecoder(model.vae, *scaling),
            inputs={"latents": latents},
            outputs={"images": ("batch", 3, "image_height", "image_width")},
            size_multiple=multiple,
            traced_multiple=2,
            max_tokens=tokens,
            needs_float32=vae_needs_float32,
        ),
        Graph(
            name="vae_encoder",
            module=VaeEncoder(model.vae, *scaling),
            inputs={"images": ("batch", 3, "height", "width")},
            outputs={"mean": posterior, "std": posterior},
            size_multiple=multiple * model.scale_factor,
            traced_multiple=2 * model.scale_factor,
            max_tokens=tokens,
            needs_float32=vae_needs_float32,
        ),
    ]


def _text_encoder_graph(encoder: Encoder) -> Graph:
    module = encoder.module()
    tokens, dim = encoder.max_tokens, encoder.dim
    return Graph(
        name=encoder.name,
        module=module,
        inputs={"inputs_embeds": ("batch", tokens, dim), "eos_index": ("batch",)},
        outputs={"prompt_embeds": ("batch", tokens, dim), "pooled": ("batch", module.pooled_dim)},
        size_multiple=1,
        max_tokens=tokens,
    )


def _denoiser_graph(model: DiffusionModel, pooled_dim: int | str) -> Graph:
    unet = model.unet
    channels = int(unet.config["in_channels"])
    latents = ("rows", channels, "height", "width")
    added: dict[str, Axes] = {}
    if model.family.has_added_inputs:
        added = {"text_embeds": ("rows", pooled_dim), "time_ids": ("rows", NUM_TIME_IDS)}
    return Graph(
        name="denoiser",
        module=AddedInputsDenoiser(unet) if added else Denoiser(unet),
        inputs={
            "latents": latents,
            "timestep": ("rows",),
            "prompt_embeds": ("rows", "tokens", sum(model.dims)),
            **added,
        },
        outputs={"noise_pred": latents},
        size_multiple=size_multiple(unet),
        max_tokens=model.max_tokens,
        float32_inputs=("timestep", "time_ids"),
        bears_int8=True,
    )


def export_graph(
    graph: Graph,
    folder: Path,
    *,
    precision: str,
    fused_attention: bool = False,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> ComponentSpec:
    """Write `folder/NAME.onnx`, with weights in `NAME.onnx.data` if they exceed the limit.

    `fused_attention` is for ONNX Runtime alone (trainer/attention_fusion.py); what TensorRT
    compiles must be standard operators. `int8` is float32 here: trainer/quantization.py follows.
    Raises `ExportError` if an axis that must be dynamic was frozen.
    """
    half = graph.precision(precision) == "fp16"
    path = folder / f"{graph.name}.onnx"
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{graph.name}.") as scratch:
        model, weights = _trace(graph, Path(scratch) / path.name, half=half)
    _check_inputs(graph, model)
    _name_output_axes(graph, model)
    if fused_attention:
        fuse_attention(model)
    write_with_weights(model, weights, path, external_data_bytes=external_data_bytes)
    return ComponentSpec(
        file=path.name,
        inputs=_tensor_specs(model.graph.input),
        outputs=_tensor_specs(model.graph.output),
        precision="fp16" if half else "fp32",
    )


def _trace(graph: Graph, file: Path, *, half: bool) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    example = graph.random_inputs(_tracing_sizes(graph), seed=0)
    if half:
        example = tuple(
            tensor.half()
            if tensor.is_floating_point() and name not in graph.float32_inputs
            else tensor
            for name, tensor in zip(graph.inputs, example, strict=True)
        )
    dynamic_axes = {
        name: {index: axis for index, axis in enumerate(axes) if isinstance(axis, str)}
        for name, axes in graph.inputs.items()
    }
    outputs = list(graph.outputs)
    return trace_without_weights(
        graph.module, example, file, inputs=dynamic_axes, outputs=outputs, half=half
    )


def _tracing_sizes(graph: Graph) -> dict[str, int]:
    """Sizes that nothing in a graph could mean on purpose: not 0 or 1, and none like another."""
    multiple = graph.traced_multiple or graph.size_multiple
    return {
        "batch": 3,
        "rows": 3,
        "tokens": graph.max_tokens + 2,
        "height": 2 * multiple,
        "width": 3 * multiple,
    }


def _check_inputs(graph: Graph, model: onnx.ModelProto) -> None:
    found = {tensor.name: tuple(_shape(tensor)) for tensor in model.graph.input}
    if found != graph.inputs:
        raise ExportError(f"{graph.name}.onnx takes {found}, it must take {graph.inputs}")


def _name_output_axes(graph: Graph, model: onnx.ModelProto) -> None:
    """The exporter names output axes after nodes; give them the names of the inputs' axes."""
    for tensor, axes in zip(model.graph.output, graph.outputs.values(), strict=True):
        for dimension, axis in zip(tensor.type.tensor_type.shape.dim, axes, strict=True):
            if isinstance(axis, str):
                dimension.dim_param = axis
            else:
                dimension.dim_value = axis


def _shape(tensor: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in tensor.type.tensor_type.shape.dim]


def _tensor_specs(tensors: Any) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=tensor.name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type).name,
            shape=_shape(tensor),
        )
        for tensor in tensors
    ]
