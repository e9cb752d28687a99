"""Whole models of each family with random weights, made from configs in under a second."""

from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
    LDMTextToImagePipeline,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
XL_DIMS, XL_POOLED_DIM, XL_TIME_DIM = (24, 28), 20, 8
LDM_DIM = 20
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
    hidden_act: str = "quick_gelu",
) -> Path:
    """Save a diffusers folder that `StableDiffusionPipeline.from_pretrained` loads; returns it.

    Two VAE blocks (2 pixels a latent) and no width like the embedded model's.
    `sd1_eos_token_id` writes the text encoder's `eos_token_id` as Stable Diffusion 1.x has it: 2.
    """
    tokenizer = make_tokenizer(max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            text_config(tokenizer, dim, sd1_eos_token_id=sd1_eos_token_id, hidden_act=hidden_act)
        )
        unet = make_tiny_unet(unet_channels, dim, latent_channels, latent_size)
        vae = make_tiny_vae(latent_channels, scaling_factor, force_upcast)
    make_pipeline: Any = StableDiffusionPipeline
    make_pipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def make_tiny_xl_model(
    path: Path,
    *,
    seed: int = 0,
    max_tokens: int = 20,
    sd1_eos_token_id: bool = False,
    force_zeros: bool = True,
    dims: tuple[int, int] = XL_DIMS,
) -> Path:
    """Save a diffusers folder that `StableDiffusionXLPipeline.from_pretrained` loads; returns it.

    As in SDXL the second text encoder projects what it pools, and its tokenizer pads with "!".
    """
    tokenizers: list[Any] = [make_tokenizer(max_tokens) for _ in dims]
    tokenizers[1].pad_token = "!"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configs = [
            text_config(
                tokenizer, dim, sd1_eos_token_id=sd1_eos_token_id, projection_dim=XL_POOLED_DIM
            )
            for tokenizer, dim in zip(tokenizers, dims, strict=True)
        ]
        text_encoder = CLIPTextModel(configs[0])
        text_encoder_2 = CLIPTextModelWithProjection(configs[1])
        unet = make_tiny_unet(
            (16, 24, 32),
            sum(dims),
            4,
            12,
            addition_embed_type="text_time",
            addition_time_embed_dim=XL_TIME_DIM,
            projection_class_embeddings_input_dim=XL_POOLED_DIM + 6 * XL_TIME_DIM,
        )
        vae = make_tiny_vae(4, 0.3, False)
    make_pipeline: Any = StableDiffusionXLPipeline
    make_pipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=make_scheduler("epsilon"),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    ).save_pretrained(path)
    return path


def make_tiny_ldm_model(
    path: Path,
    *,
    seed: int = 0,
    max_tokens: int = 77,
    vae_channels: tuple[int, ...] = (8, 8, 8, 8),
    force_upcast: bool = False,
) -> Path:
    """Save a diffusers folder that `LDMTextToImagePipeline.from_pretrained` loads; returns it.

    77 positions and 8 pixels a latent, which that pipeline takes for granted. The attention of the
    text encoder is narrower than its embeddings, as that of the real one, 8 x 64 of 1280.
    """
    tokenizer = make_bert_tokenizer(max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = LDMBertModel(
            LDMBertConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=max_tokens,
                encoder_layers=2,
                encoder_ffn_dim=2 * LDM_DIM,
                encoder_attention_heads=2,
                head_dim=6,
                d_model=LDM_DIM,
                init_std=0.2,  # so that words are heard beside positions after two layers
            )
        )
        unet = make_tiny_unet((16, 24, 32), LDM_DIM, 4, 8)
        _sharpen_attention(unet)
        vae = make_tiny_vae(4, 0.3, force_upcast, channels=vae_channels)
    make_pipeline: Any = LDMTextToImagePipeline
    make_pipeline(
        vqvae=vae,
        bert=bert,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler("epsilon"),
    ).save_pretrained(path)
    return path


def _sharpen_attention(unet: UNet2DConditionModel) -> None:
    """Make one of 77 tokens count: random weights attend to all of them alike.

    Sharper still, and float16 would not pass for rounding any more.
    """
    factors = {"to_q": 3, "to_k": 3, "to_v": 24}
    for name, weight in unet.named_parameters():
        for part, factor in factors.items():
            if f"attn2.{part}." in name:
                weight.data *= factor


def text_config(
    tokenizer: Any, dim: int, *, sd1_eos_token_id: bool = False, **options: Any
) -> CLIPTextConfig:
    """Two layers for a tokenizer's vocabulary and length."""
    eos = tokenizer.convert_tokens_to_ids(EOS)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=2 if sd1_eos_token_id else eos,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def make_scheduler(prediction_type: Literal["epsilon", "v_prediction"]) -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def make_tiny_unet(
    channels: tuple[int, ...], dim: int, latent_channels: int, latent_size: int, **options: Any
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
        **options,
    )


def make_tiny_vae(
    latent_channels: int,
    scaling_factor: float,
    force_upcast: bool,
    *,
    channels: tuple[int, ...] = (8, 16),
) -> AutoencoderKL:
    """An autoencoder of 2 pixels a latent, or another power of 2, with attention in the middle."""
    make: Any = AutoencoderKL  # its annotations allow one block only
    return make(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
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


def make_bert_tokenizer(max_tokens: int) -> BertTokenizer:
    """BERT's lower-casing WordPiece tokenizer over a few words, and ASCII for all others."""
    letters = ascii_lowercase + digits + punctuation
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokens = [*special, *_MERGED_WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizer(vocab=vocabulary, model_max_length=max_tokens)
