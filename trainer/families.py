"""Families of diffusers models: the one place in the trainer that tells them apart.

A family is described by data: which folders of a model hold its text encoders and its autoencoder,
which module makes hidden states of embeddings, what else the denoiser takes, and which diffusers
pipeline draws with it. The rest of the trainer loops over `DiffusionModel.encoders` and hands on
`added_inputs`. docs/families.md tells how another family plugs in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from jaxtyping import Float
from torch import Tensor
from transformers import BertTokenizer, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from engine.bundle import TEXT_ENCODER_2
from engine.families import time_ids
from trainer.encoder_modules import ClipTextEncoder, LdmBertTextEncoder, TextEncoder

SUPPORTED = (
    "supported: Stable Diffusion 1.x and 2.x (one CLIP text encoder, UNet, AutoencoderKL), "
    "Stable Diffusion XL (two) and text-to-image latent diffusion (LDMBertModel instead)"
)
_CLIP = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}
# Parts of other families' models, which no pipeline here would use.
_FOREIGN_PARTS = (TEXT_ENCODER_2, "text_encoder_3", "transformer")
# Why a class that a family's pipeline takes is refused here.
_REASONS = {
    "VQModel": "it encodes a picture as one point, learning wants a mean and a deviation",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """One text encoder of a family's models, and the tokenizer that goes with it."""

    name: str  # of its graph in a bundle and of its tensor in a concept
    folder: str  # in a model; also what its pipeline calls it, as the next
    classes: Mapping[str, Any]  # by their names in model_index.json
    module: Callable[[Any], TextEncoder]  # around one of these classes
    tokenizer: str = "tokenizer"  # folder
    tokenizer_class: Any = CLIPTokenizer
    # What the tokenizer calls the tokens before and after a prompt.
    bos: str = "bos_token_id"
    eos: str = "eos_token_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is a family's own."""

    name: str  # as the manifest has it
    encoders: tuple[EncoderSpec, ...]  # the denoiser reads their outputs side by side
    pipeline: Callable[[], Any]  # imports the class of diffusers that draws with it
    pipeline_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    vae: str = "vae"  # folder
    takes_negative_prompt: bool = True  # the pipeline does; the runtime in any case
    # Properties of `DiffusionModel` that the pipeline has constants for.
    fixed: Mapping[str, int] = field(default_factory=dict[str, int])
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
            self.vae: ("AutoencoderKL",),
            **{encoder.folder: encoder.classes for encoder in self.encoders},
        }
        wrong = [
            f"{part} {_named(found.get(part))}"
            for part, classes in wanted.items()
            if found.get(part) not in classes
        ]
        foreign = [part for part in _FOREIGN_PARTS if part in found and part not in wanted]
        return wrong + [f"{part} {found[part]}" for part in foreign]


def _named(class_name: str | None) -> str:
    """A class that a part should not have, with the reason where it is not obvious."""
    if class_name is None:
        return "is missing"
    return f"{class_name}: {_REASONS[class_name]}" if class_name in _REASONS else class_name


# Only the parity gate draws with them, and importing them takes seconds and prints advice.
def _stable_diffusion_pipeline() -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    return StableDiffusionPipeline


def _stable_diffusion_xl_pipeline() -> Any:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )

    return StableDiffusionXLPipeline


def _ldm_pipeline() -> Any:
    from trainer.ldm_pipeline import LDMConceptPipeline

    return LDMConceptPipeline


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    encoders=(
        EncoderSpec(
            name="text_encoder", folder="text_encoder", classes=_CLIP, module=ClipTextEncoder
        ),
    ),
    pipeline=_stable_diffusion_pipeline,
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
        EncoderSpec(
            name="text_encoder",
            folder="text_encoder",
            classes=_CLIP,
            module=partial(ClipTextEncoder, penultimate=True),
        ),
        EncoderSpec(
            name=TEXT_ENCODER_2,
            folder=TEXT_ENCODER_2,
            # Its projected pooled embedding is an input of the denoiser.
            classes={"CLIPTextModelWithProjection": CLIPTextModelWithProjection},
            module=partial(ClipTextEncoder, penultimate=True),
            tokenizer="tokenizer_2",
        ),
    ),
    pipeline=_stable_diffusion_xl_pipeline,
    pipeline_options={"add_watermarker": False},
    addition_embed_type="text_time",
    zero_empty_negative=True,
)
# Rombach et al. 2022, arXiv 2112.10752, section 4.3; what Gal et al. 2022, arXiv 2208.01618, used.
LATENT_DIFFUSION = Family(
    name="latent-diffusion",
    encoders=(
        EncoderSpec(
            name="text_encoder",
            folder="bert",
            classes={"LDMBertModel": LDMBertModel},
            module=LdmBertTextEncoder,
            tokenizer_class=BertTokenizer,
            bos="cls_token_id",
            eos="sep_token_id",
        ),
    ),
    pipeline=_ldm_pipeline,
    vae="vqvae",
    takes_negative_prompt=False,
    fixed={"max_tokens": 77, "scale_factor": 8},
)


def family_of(found: Mapping[str, str]) -> Family:
    """The family that a model (part -> class) is nearest to; `Family.faults` says if it is one.

    By its parts: the pipeline's class may be one for image-to-image, or somebody's own.
    """
    for family in (STABLE_DIFFUSION_XL, LATENT_DIFFUSION):
        if family.encoders[-1].folder in found:
            return family
    return STABLE_DIFFUSION
