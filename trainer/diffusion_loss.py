"""The training objective of a latent diffusion model, as pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float, Float32, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """What the loss must know of the schedule that the denoiser was trained with."""

    alphas_cumprod: Float32[Tensor, " timesteps"]
    prediction_type: str  # "epsilon" or "v_prediction"

    @classmethod
    def from_config(cls, scheduler_config: dict[str, Any]) -> Self:
        """Read off diffusers' scheduler: it knows each `beta_schedule` and zero terminal SNR."""
        scheduler: Any = DDIMScheduler.from_config(scheduler_config)
        return cls(
            alphas_cumprod=scheduler.alphas_cumprod.float(),
            prediction_type=str(scheduler.config["prediction_type"]),
        )

    def to(self, device: torch.device) -> Self:
        return type(self)(
            alphas_cumprod=self.alphas_cumprod.to(device), prediction_type=self.prediction_type
        )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def signal_and_noise(
        self, timesteps: Int64[Tensor, " batch"]
    ) -> tuple[Float32[Tensor, "batch 1 1 1"], Float32[Tensor, "batch 1 1 1"]]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), to be broadcast over latents."""
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()


def add_noise(
    schedule: NoiseSchedule,
    latents: Float32[Tensor, "batch channels height width"],
    noise: Float32[Tensor, "batch channels height width"],
    timesteps: Int64[Tensor, " batch"],
) -> Float32[Tensor, "batch channels height width"]:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon (arXiv 2006.11239, eq. 4)."""
    signal, deviation = schedule.signal_and_noise(timesteps)
    return signal * latents + deviation * noise


def prediction_target(
    schedule: NoiseSchedule,
    latents: Float32[Tensor, "batch channels height width"],
    noise: Float32[Tensor, "batch channels height width"],
    timesteps: Int64[Tensor, " batch"],
) -> Float32[Tensor, "batch channels height width"]:
    """epsilon, or v = sqrt(alpha_bar_t) epsilon - sqrt(1 - alpha_bar_t) x_0 (arXiv 2202.00512)."""
    if schedule.prediction_type == "epsilon":
        return noise
    signal, deviation = schedule.signal_and_noise(timesteps)
    return signal * noise - deviation * latents


def diffusion_loss(
    unet: UNet2DConditionModel,
    schedule: NoiseSchedule,
    *,
    latents: Float32[Tensor, "batch channels height width"],
    noise: Float32[Tensor, "batch channels height width"],
    timesteps: Int64[Tensor, " batch"],
    prompt_embeds: Float[Tensor, "batch tokens dim"],
    added_inputs: Mapping[str, Float[Tensor, "batch _"]] | None = None,
    weights: Float32[Tensor, "batch 1 height width"] | None = None,
) -> Float32[Tensor, " batch"]:
    """Mean squared error of the denoiser for each sample, without reduction over the batch.

    `added_inputs` are `Family.added_inputs`. `weights`, whose mean must be 1 for each sample, say
    how much the error counts at each place; without them it counts alike everywhere.
    """
    noisy = add_noise(schedule, latents, noise, timesteps)
    target = prediction_target(schedule, latents, noise, timesteps)
    (predicted,) = unet(
        noisy.to(unet.dtype),
        timesteps,
        prompt_embeds.to(unet.dtype),
        added_cond_kwargs=added_inputs,
        return_dict=False,
    )
    errors = (predicted.float() - target).square()
    if weights is not None:
        errors = weights * errors
    return errors.mean(dim=(1, 2, 3))
