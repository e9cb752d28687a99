"""Families of diffusers models: the one place in the trainer that tells them apart.

A family is described by data: which folders of a model hold its text encoders, which of their
hidden states the denoiser reads, what else the denoiser takes, and which diffusers pipeline draws
with it. The rest of the trainer loops over `DiffusionModel.encoders` and hands on `added_inputs`.
docs/families.md tells how another family plugs in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from engine.bundle import TEXT_ENCODER_2
from engine.families import time_ids

SUPPORTED = (
    "supported: Stable Diffusion 1.x and 2.x (one CLIP text encoder, UNet, AutoencoderKL) and "
    "Stable Diffusion XL (two)"
)
_CLIP = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}
# Parts of other families' models, which no pipeline here would use.
_FOREIGN_PARTS = (TEXT_ENCODER_2, "text_encoder_3", "transformer")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFolder:
    """One text encoder of a family's models, and the tokenizer that goes with it."""

    name: str  # of its folder, of its graph in a bundle and of its tensor in a concept
    tokenizer: str  # folder of its tokenizer
    classes: Mapping[str, Any]  # by their names in model_index.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is a family's own."""

    name: str  # as the manifest has it
    encoders: tuple[EncoderFolder, ...]  # the denoiser reads their outputs side by side
    pipeline: Any  # the class of diffusers that draws with it
    pipeline_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    penultimate: bool = False  # the denoiser reads hidden_states[-2], not the normed last ones
    addition_embed_type: str | None = None  # of the UNet's config: what it adds to the timestep
    zero_empty_negative: bool = False  # unless a model's force_zeros_for_empty_prompt says not
    # StableDiffusionPipeline sets steps_offset to 1 and clip_sample to false; others leave them.
    corrects_scheduler: bool = False

    @property
    def has_added_inputs(self) -> bool:
        """Whether the denoiser takes the pooled prompt and SDXL's size conditioning."""
        return self.addition_embed_type is not None

    def added_inputs(
        self, pooled: Float[Tensor, "rows pooled_dim"], *, width: int, height: int
    ) -> dict[str, Tensor]:
        """What the UNet takes as `added_cond_kwargs`, for whole pictures of this size in pixels.

        `pooled` is that of the last text encoder.
        """
        if not self.has_added_inputs:
            return {}
        ids = torch.tensor(time_ids(width, height), device=pooled.device)
        return {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}

    def faults(self, found: Mapping[str, str]) -> list[str]:
        """In words, what of a model (part -> class) is not as this family has it."""
        wanted: dict[str, Mapping[str, Any] | tuple[str, ...]] = {
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
            **{encoder.name: encoder.classes for encoder in self.encoders},
        }
        wrong = [
            f"{part} {found.get(part, 'is missing')}"
            for part, classes in wanted.items()
            if found.get(part) not in classes
        ]
        foreign = [part for part in _FOREIGN_PARTS if part in found and part not in wanted]
        return wrong + [f"{part} {found[part]}" for part in foreign]


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    encoders=(EncoderFolder(name="text_encoder", tokenizer="tokenizer", classes=_CLIP),),
    pipeline=StableDiffusionPipeline,
    pipeline_options={
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
    corrects_scheduler=True,
)
# Podell et al. 2023, arXiv 2307.01952, section 2.1 (text encoders) and 2.2 (size conditioning).
STABLE_DIFFUSION_XL = Family(
    name="stable-diffusion-xl",
    encoders=(
        EncoderFolder(name="text_encoder", tokenizer="tokenizer", classes=_CLIP),
        EncoderFolder(
            name=TEXT_ENCODER_2,
            tokenizer="tokenizer_2",
            # Its projected pooled embedding is an input of the denoiser.
            classes={"CLIPTextModelWithProjection": CLIPTextModelWithProjection},
        ),
    ),
    pipeline=StableDiffusionXLPipeline,
    pipeline_options={"add_watermarker": False},
    penultimate=True,
    addition_embed_type="text_time",
    zero_empty_negative=True,
)


def family_of(found: Mapping[str, str]) -> Family:
    """The family that a model (part -> class) is nearest to; `Family.faults` says if it is one.

    By its parts: the pipeline's class may be one for image-to-image, or somebody's own.
    """
    return STABLE_DIFFUSION_XL if TEXT_ENCODER_2 in found else STABLE_DIFFUSION
