"""The configs of the real models, as far as they differ from the defaults of their classes.

From the `config.json` files of the models on the Hugging Face hub: stable-diffusion-v1-5/
stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 (768 pixels, v-prediction) and stabilityai/
stable-diffusion-xl-base-1.0. Text encoders: CLIP ViT-L/14, OpenCLIP ViT-H/14 (without its last
layer) and OpenCLIP ViT-bigG/14.
"""

from dataclasses import dataclass
from typing import Any

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FullSize:
    """One model: its pipeline's class and the configs of its parts."""

    title: str
    pipeline: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[tuple[str, dict[str, Any]], ...]  # class of transformers, config
    prediction_type: str = "epsilon"

    @property
    def scheduler(self) -> dict[str, Any]:
        """Of DDIM, whose noise schedule is that of the model's own sampler."""
        return {**SCHEDULER, "prediction_type": self.prediction_type}


FAMILIES = {
    "sd15": FullSize(
        title="Stable Diffusion 1.5",
        pipeline="StableDiffusionPipeline",
        unet={
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        vae={**VAE, "sample_size": 512},
        text_encoders=(("CLIPTextModel", CLIP_L),),
    ),
    "sd21": FullSize(
        title="Stable Diffusion 2.1 (768, v-prediction)",
        pipeline="StableDiffusionPipeline",
        unet={
            "sample_size": 96,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        vae={**VAE, "sample_size": 768},
        text_encoders=(
            (
                "CLIPTextModel",
                {
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 23,
                    "num_attention_heads": 16,
                    "max_position_embeddings": 77,
                    "projection_dim": 512,
                    "hidden_act": "gelu",
                },
            ),
        ),
        prediction_type="v_prediction",
    ),
    "sdxl": FullSize(
        title="Stable Diffusion XL base 1.0",
        pipeline="StableDiffusionXLPipeline",
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        text_encoders=(
            ("CLIPTextModel", CLIP_L),
            (
                "CLIPTextModelWithProjection",
                {
                    "hidden_size": 1280,
                    "intermediate_size": 5120,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 20,
                    "max_position_embeddings": 77,
                    "projection_dim": 1280,
                    "hidden_act": "gelu",
                },
            ),
        ),
    ),
}
