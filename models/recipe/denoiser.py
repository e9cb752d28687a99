"""Text encoder and UNet, trained together from scratch to predict velocity."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.recipe.courses import Course
from models.recipe.devices import autocast, compile_on_gpu
from models.recipe.latents import LatentPool
from models.recipe.settings import Setting

_CAPTION_DROPOUT = 0.1
_TEXT_HEADS = 4
# Mean of the logit of a timestep as a share of the schedule: the share is 0.65 there.
_FOCUS = 0.6


class Denoiser(nn.Module):
    """What is trained: the text encoder and the UNet that reads it."""

    def __init__(self, setting: Setting, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(setting, tokenizer)
        self.unet = new_unet(setting)

    def forward(
        self,
        latents: Float[Tensor, "batch channels height width"],
        timesteps: Int64[Tensor, " batch"],
        input_ids: Int64[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The velocity that the model sees in noisy latents."""
        words = self.text_encoder(input_ids).last_hidden_state
        return self.unet(latents, timesteps, words).sample


def new_text_encoder(setting: Setting, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of CLIP's architecture."""
    special: Any = tokenizer  # its annotation allows lists of ids
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=setting.text_width,
            intermediate_size=4 * setting.text_width,
            projection_dim=setting.text_width,
            num_hidden_layers=setting.text_layers,
            num_attention_heads=_TEXT_HEADS,
            max_position_embeddings=setting.max_tokens,
            bos_token_id=special.bos_token_id,
            eos_token_id=special.eos_token_id,
            pad_token_id=special.pad_token_id,
        )
    )


def new_unet(setting: Setting) -> UNet2DConditionModel:
    """An untrained UNet of two levels."""
    unet: Any = UNet2DConditionModel(
        sample_size=setting.latent_size,
        in_channels=setting.latent_channels,
        out_channels=setting.latent_channels,
        block_out_channels=setting.denoiser_channels,
        layers_per_block=setting.denoiser_layers,
        # The words are read at half the latents' resolution, where attention is cheap.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=setting.text_width,
        attention_head_dim=setting.denoiser_heads,
        norm_num_groups=setting.denoiser_groups,
    )
    return unet.to(memory_format=torch.channels_last)


def new_sampler() -> DDIMScheduler:
    """The noise schedule: cosine, ending in pure noise, or flat backgrounds leak into the start."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # of no effect with trailing spacing; diffusers complains about others
    )


def train_denoiser(
    setting: Setting,
    tokenizer: CLIPTokenizer,
    pool: LatentPool,
    path: Path,
    device: torch.device,
    deadline: float | None = None,
) -> Course:
    """Trains, or goes on training, the denoiser whose checkpoint is `path`."""
    torch.manual_seed(0)
    denoiser = Denoiser(setting, tokenizer)
    course = Course(
        path=path,
        module=denoiser,
        total_images=setting.denoiser_images,
        batch_size=setting.denoiser_batch,
        rate=setting.denoiser_rate,
        device=device,
        deadline=deadline,
        warmup_images=setting.warmup_images,
    )
    if device.type == "cpu":  # for so few tokens plain attention trains a fifth faster there
        denoiser.unet.set_attn_processor(AttnProcessor())
        denoiser.text_encoder.set_attn_implementation("eager")
    compile_on_gpu(device, denoiser.unet)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(device)
    rng = np.random.default_rng((1, course.images))
    torch.manual_seed(course.images)  # the noise goes on, not again, after a stop
    sampler = new_sampler()
    for images in course.steps():
        pool.grow_for(images)
        latents, input_ids = pool.draw(setting.denoiser_batch, rng)
        dropped = torch.rand(len(input_ids), 1, device=device) < _CAPTION_DROPOUT
        input_ids = torch.where(dropped, empty, input_ids)
        course.apply(velocity_loss(denoiser, sampler, latents.float(), input_ids))
    return course


def velocity_loss(
    denoiser: nn.Module,
    sampler: DDIMScheduler,
    latents: Float32[Tensor, "batch channels height width"],
    input_ids: Int64[Tensor, "batch tokens"],
) -> Float32[Tensor, ""]:
    """Squared error of the predicted velocity (Salimans and Ho 2022, section 4), with new noise."""
    latents = latents.contiguous(memory_format=torch.channels_last)
    steps: Any = stratified_timesteps(
        len(latents), sampler.config["num_train_timesteps"], latents.device
    )
    noise = torch.randn_like(latents)
    noisy = sampler.add_noise(latents, noise, steps)
    velocity = sampler.get_velocity(latents, noise, steps)
    with autocast(latents.device):
        predicted = denoiser(noisy, steps, input_ids)
    return (predicted.float() - velocity).square().mean()


def stratified_timesteps(
    count: int, num_train_timesteps: int, device: torch.device
) -> Int64[Tensor, " count"]:
    """Timesteps of a batch, stratified: less variance than chance.

    Four of five follow a logit-normal distribution (Esser et al. 2024, arXiv 2403.03206, section
    3.1) around the noisier half, where the words decide what appears; the rest, evenly spread, keep
    the whole schedule in use. Were all evenly spread, most of the loss would be noise that no word
    explains: of the embedded model, trained so, objects had not even their colours after 80,000
    images, and had them 45,000 images after the change.
    """
    even = _strata(count // 5, device)
    quantiles = _strata(count - len(even), device).clamp(1e-6, 1 - 1e-6)
    shares = torch.cat([even, torch.sigmoid(_FOCUS + torch.special.ndtri(quantiles))])
    return (shares * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def _strata(count: int, device: torch.device) -> Float32[Tensor, " count"]:
    """One number from each of `count` equal parts of 0 to 1."""
    places = torch.arange(count, device=device) + torch.rand(count, device=device)
    return places / max(count, 1)
