"""Previews for next to nothing: a linear map from latents to RGB, fitted to the VAE's decoder."""

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from trainer.model import DiffusionModel
from trainer.onnx_graphs import VaeDecoder

NUM_SAMPLES = 24
COARSE, FINE = 4, 12  # latents a side: drawn, and decoded


@torch.no_grad()
def fit_latent_rgb(
    model: DiffusionModel, *, num_samples: int = NUM_SAMPLES, seed: int = 0
) -> Float32[np.ndarray, "channels_plus_1 3"]:
    """Least squares from latents (denoiser scale) to decoded, shrunken RGB in [-1, 1].

    The last row is the bias. Fitted on smooth normal latents: of pictures that the embedded model's
    VAE has encoded, the map then explains 95 % of the variance; fitted on white noise 92 to 93 %,
    on encoded gradients and discs 89 %, on those pictures themselves 97 %.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = int(model.unet.config["in_channels"])
    coarse = torch.randn(num_samples, channels, COARSE, COARSE, generator=generator)
    latents = functional.interpolate(coarse, (FINE, FINE), mode="bicubic")
    decoder = VaeDecoder(model.vae, model.scaling_factor, model.shift_factor)
    colours = torch.cat([shrunken(decoder(sample[None]), FINE) for sample in latents])
    inputs = functional.pad(_pixels(latents), (0, 1), value=1.0)
    # gelsd bears latents of deficient rank, as an untrained VAE may have them.
    return torch.linalg.lstsq(inputs, _pixels(colours), driver="gelsd").solution.float().numpy()


def shrunken(
    images: Float[Tensor, "batch 3 height width"], size: int
) -> Float[Tensor, "batch 3 {size} {size}"]:
    """Images at one pixel a latent, each the mean of what it stands for."""
    return functional.adaptive_avg_pool2d(images.clamp(-1.0, 1.0), (size, size))


def _pixels(
    images: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "pixels channels"]:
    """One row a pixel, in float64 for the fit."""
    return images.movedim(1, -1).flatten(0, 2).double()
