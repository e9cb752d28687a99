"""The autoencoder: a small AutoencoderKL whose latents have mean 0 and deviation 1 by channel."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float32
from torch import Tensor, nn

from models.recipe.compositions import Composer
from models.recipe.courses import Course
from models.recipe.devices import autocast, compile_on_gpu
from models.recipe.pictures import composed_batches, to_tensor
from models.recipe.settings import Setting

Pictures = Float32[Tensor, "batch 3 height width"]  # -1 to 1

_KL_WEIGHT = 3e-4
_CROPPED_SHARE = 0.92
# sRGB to YCbCr's two chroma axes (ITU-R BT.601): plain L1 learns brightness first and colours late.
_CHROMA = ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def new_autoencoder(setting: Setting) -> AutoencoderKL:
    """The untrained autoencoder of a setting."""
    levels = len(setting.autoencoder_channels)
    make: Any = AutoencoderKL  # its annotations allow one block only
    autoencoder = make(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=setting.autoencoder_channels,
        layers_per_block=1,
        latent_channels=setting.latent_channels,
        norm_num_groups=setting.autoencoder_groups,
        sample_size=setting.image_size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    for block in autoencoder.modules():
        if isinstance(block, ResnetBlock2D):  # residual branches begin as zero
            nn.init.zeros_(block.conv2.weight)
    return autoencoder.to(memory_format=torch.channels_last)


def train_autoencoder(
    setting: Setting,
    composer: Composer,
    path: Path,
    device: torch.device,
    deadline: float | None = None,
) -> Course:
    """Trains, or goes on training, the autoencoder whose checkpoint is `path`."""
    torch.manual_seed(0)
    course = Course(
        path=path,
        module=new_autoencoder(setting),
        total_images=setting.autoencoder_images,
        batch_size=setting.autoencoder_batch,
        rate=setting.autoencoder_rate,
        device=device,
        deadline=deadline,
        warmup_images=setting.warmup_images,
    )
    autoencoder: Any = course.module
    compile_on_gpu(device, autoencoder.encoder, autoencoder.decoder)
    batches = composed_batches(composer, setting.autoencoder_batch, course.images, device)
    rng = np.random.default_rng(course.images)
    for images in course.steps():
        pictures = to_tensor(next(batches).pixels, device)
        if images < _CROPPED_SHARE * setting.autoencoder_images:
            pictures = _cropped(pictures, setting.autoencoder_crop, rng)
        course.apply(**_losses(autoencoder, _recoloured(pictures, rng)))
    return course


def _losses(autoencoder: Any, pictures: Pictures) -> dict[str, Float32[Tensor, ""]]:
    with autocast(pictures.device):
        posterior = autoencoder.encode(pictures).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
    decoded = decoded.float()
    kl = 0.5 * (
        posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
    )
    return {
        "loss": reconstruction_loss(decoded, pictures) + _KL_WEIGHT * kl.mean(),
        "psnr": psnr(decoded.detach(), pictures),
        "kl": kl.mean(),
    }


def reconstruction_loss(decoded: Pictures, pictures: Pictures) -> Float32[Tensor, ""]:
    """L1 and squared error, of pixels, of their differences to the next, and of chroma."""
    error = decoded - pictures
    chroma = torch.einsum("kc,bchw->bkhw", torch.tensor(_CHROMA, device=error.device), error)
    return (
        error.abs().mean()
        + 2 * error.square().mean()
        + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        + chroma.abs().mean()
    )


def psnr(decoded: Pictures, pictures: Pictures) -> Float32[Tensor, ""]:
    """Mean over the pictures of the peak signal-to-noise ratio in dB; the range is -1 to 1."""
    squared = (decoded.clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / squared.clamp(min=1e-8))).mean()


@torch.no_grad()
def normalized(autoencoder: AutoencoderKL, pictures: list[Pictures]) -> AutoencoderKL:
    """The same autoencoder with latents of mean 0 and deviation 1, by channel, on these batches.

    Exact: the linear layers on both sides of the latents take the change up, so that the scaling
    factor of the model is 1. Changes the autoencoder that it is given.
    """
    module: Any = autoencoder
    latents = torch.cat([module.encode(batch).latent_dist.mean.float() for batch in pictures])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    quant, post_quant = module.quant_conv, module.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= deviation[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()  # the second half is the log-variance
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= deviation[None, :, None, None]
    return autoencoder


def _cropped(pictures: Pictures, side: int, rng: np.random.Generator) -> Pictures:
    top, left = rng.integers(0, pictures.shape[-1] - side + 1, 2)
    return pictures[..., top : top + side, left : left + side]


def _recoloured(pictures: Pictures, rng: np.random.Generator) -> Pictures:
    """A third of the batch with its colour channels permuted: every colour is met everywhere."""
    count = len(pictures) // 3
    order = rng.permutation(3).tolist()
    return torch.cat([pictures[:count][:, order], pictures[count:]]).contiguous(
        memory_format=torch.channels_last
    )
