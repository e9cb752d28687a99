"""A whole Stable Diffusion model with random weights, made from configs in under a second."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_MERGED_WORDS = ("a", "an", "of", "in", "the", "cat", "dog", "photo", "drawing", "red", "morning")


def make_tiny_model(
    path: Path,
    *,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    seed: int = 0,
    max_tokens: int = 20,
    dim: int = 24,
    unet_channels: tuple[int, ...] = (16, 24, 32),
    latent_channels: int = 4,
    latent_size: int = 12,
    scaling_factor: float = 0.3,
    force_upcast: bool = False,
    sd1_eos_token_id: bool = False,
) -> Path:
    """Save a diffusers folder that `StableDiffusionPipeline.from_pretrained` loads; returns it.

    Two VAE blocks (2 pixels a latent) and no width like the embedded model's.
    `sd1_eos_token_id` writes the text encoder's `eos_token_id` as Stable Diffusion 1.x has it: 2.
    """
    tokenizer: Any = make_tokenizer(max_tokens)
    eos = tokenizer.convert_tokens_to_ids(EOS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=dim,
                intermediate_size=2 * dim,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=max_tokens,
                bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
                eos_token_id=2 if sd1_eos_token_id else eos,
                pad_token_id=eos,
            )
        )
        unet = make_tiny_unet(unet_channels, dim, latent_channels, latent_size)
        vae = make_tiny_vae(latent_channels, scaling_factor, force_upcast)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    make_pipeline: Any = StableDiffusionPipeline
    make_pipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def make_tiny_unet(
    channels: tuple[int, ...], dim: int, latent_channels: int, latent_size: int
) -> UNet2DConditionModel:
    """A UNet with attention at full size and in the middle, and one ResNet in each block."""
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", *("DownBlock2D",) * (len(channels) - 1)),
        up_block_types=(*("UpBlock2D",) * (len(channels) - 1), "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=dim,
    )


def make_tiny_vae(latent_channels: int, scaling_factor: float, force_upcast: bool) -> AutoencoderKL:
    """An autoencoder of 2 pixels a latent, with attention in the middle as Stable Diffusion has."""
    make: Any = AutoencoderKL  # its annotations allow one block only
    return make(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=24,
        scaling_factor=scaling_factor,
        force_upcast=force_upcast,
    )


def make_tokenizer(max_tokens: int) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own: all bytes, and a few words merged whole."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in _MERGED_WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            parts[:2] = ["".join(merge)]
            if merge not in merges:
                merges.append(merge)
                tokens.append(parts[0])
    vocabulary = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    make: Any = CLIPTokenizer  # its annotation of merges refuses the pairs that it needs
    return make(vocab=vocabulary, merges=merges, model_max_length=max_tokens)
