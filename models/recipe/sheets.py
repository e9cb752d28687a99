"""Sheets of pictures to look at: samples of the model, and pairs of the autoencoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from jaxtyping import UInt8
from PIL import Image

from models.recipe.compositions import Composer
from models.recipe.errors import RecipeError
from models.recipe.pictures import to_tensor
from trainer.messages import first_line

Pictures = UInt8[np.ndarray, "count height width 3"]

_DRAWN_AT_ONCE = 64
_PAIRS, _PAIRS_A_ROW = 48, 12


def draw(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
) -> Pictures:
    """One picture a prompt; prompt i has the noise of seed + i, whatever else is drawn."""
    generate: Any = pipeline
    drawn: list[Pictures] = []
    for first in range(0, len(prompts), _DRAWN_AT_ONCE):
        batch = list(prompts[first : first + _DRAWN_AT_ONCE])
        generators = [
            torch.Generator("cpu").manual_seed(seed + first + place) for place in range(len(batch))
        ]
        pictures = generate(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        ).images
        drawn.append(np.rint(255 * pictures).astype(np.uint8))
    return np.concatenate(drawn)


@torch.no_grad()
def decoded_again(autoencoder: AutoencoderKL, pixels: Pictures) -> Pictures:
    """What comes back of pictures that go through the autoencoder."""
    module: Any = autoencoder
    posterior = module.encode(to_tensor(pixels, module.device)).latent_dist
    decoded = module.decode(posterior.mean).sample
    back = (decoded.float().clamp(-1, 1) + 1) * 127.5
    return back.permute(0, 2, 3, 1).round().byte().cpu().numpy()


def save_sheet(pictures: Pictures, path: Path, columns: int = 8, zoom: int = 2) -> None:
    """Pictures in rows, each pixel `zoom` pixels wide.

    Errors:
        RecipeError: the file cannot be written.
    """
    rows = -(-len(pictures) // columns)
    _, height, width, _ = pictures.shape
    sheet = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    image = Image.fromarray(sheet)
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that Pillow does not know
        raise RecipeError(f"cannot write the sheet {path}: {first_line(error)}") from error


def save_pairs(autoencoder: AutoencoderKL, composer: Composer, first: int, path: Path) -> None:
    """Rows of pictures, each above what the autoencoder makes of it."""
    pixels = np.stack([composer.compose(first + place).pixels for place in range(_PAIRS)])
    back = decoded_again(autoencoder, pixels)
    rows = [
        part[row : row + _PAIRS_A_ROW]
        for row in range(0, _PAIRS, _PAIRS_A_ROW)
        for part in (pixels, back)
    ]
    save_sheet(np.concatenate(rows), path, columns=_PAIRS_A_ROW)
