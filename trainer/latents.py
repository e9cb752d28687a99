"""Latents of the training images, encoded once: the autoencoder is not in the loop."""

from dataclasses import dataclass
from typing import Self

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float32
from torch import Tensor

from trainer.model import DiffusionModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDistribution:
    """Posterior of the autoencoder for each image, in the denoiser's units.

    Mean and deviation are kept, rather than one sample, so that sampling stays in the loop as in
    the reference implementations, which encode the image again at each step.
    """

    mean: Float32[Tensor, "images channels height width"]
    std: Float32[Tensor, "images channels height width"]

    @classmethod
    @torch.no_grad()
    def encode(
        cls, model: DiffusionModel, pixels: Float32[Tensor, "images 3 height width"]
    ) -> Self:
        """Encode one image at a time: memory does not grow with the folder."""
        moments = [_posterior(model, image[None]) for image in pixels]
        shift, scale = model.shift_factor, model.scaling_factor
        return cls(
            mean=torch.cat([(moment.mean.float().cpu() - shift) * scale for moment in moments]),
            std=torch.cat([moment.std.float().cpu() * scale for moment in moments]),
        )

    def __len__(self) -> int:
        return len(self.mean)


def _posterior(
    model: DiffusionModel, image: Float32[Tensor, "1 3 height width"]
) -> DiagonalGaussianDistribution:
    vae = model.vae
    encoded = vae.encode(image.to(vae.device, vae.dtype), return_dict=False)
    return encoded[0]
