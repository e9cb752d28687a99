"""Images while learning: a small DDIM sampler for previews, with classifier-free guidance."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from engine.concepts import Concept
from engine.prompts import PromptReader
from trainer.model import DiffusionModel
from trainer.sampler_tables import make_scheduler
from trainer.splicing import plain_tokenizer, text_spec
from trainer.text_encoder import PromptEncoder


def image_size(model: DiffusionModel) -> int:
    """The side, in pixels, of the square images that the model was trained on."""
    size = model.unet.config["sample_size"]
    return (max(size) if isinstance(size, list | tuple) else int(size)) * model.scale_factor


@torch.no_grad()
def sample_images(
    model: DiffusionModel,
    concepts: Sequence[Concept],
    prompts: Sequence[str],
    *,
    size: int,
    seed: int = 0,
    num_inference_steps: int = 20,
    guidance_scale: float = 4.0,
) -> list[Image.Image]:
    """One image of `size` pixels for each prompt, each from its own noise."""
    prompt_embeds, pooled = _encode(model, concepts, [""] * len(prompts) + list(prompts))
    if model.zero_empty_negative:
        prompt_embeds[: len(prompts)], pooled[: len(prompts)] = 0.0, 0.0
    added_inputs = model.family.added_inputs(pooled, width=size, height=size)
    scheduler = make_scheduler("ddim", model.scheduler_config)
    scheduler.set_timesteps(num_inference_steps, device=model.unet.device)
    latents = _noise(model, len(prompts), size, seed)
    for timestep in scheduler.timesteps:
        (both,) = model.unet(
            torch.cat([latents] * 2).to(model.unet.dtype),
            timestep,
            prompt_embeds.to(model.unet.dtype),
            added_cond_kwargs=added_inputs,
            return_dict=False,
        )
        unconditional, conditional = both.float().chunk(2)
        noise_pred = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
    return _decode(model, latents)


def _encode(
    model: DiffusionModel, concepts: Sequence[Concept], prompts: Sequence[str]
) -> tuple[Float32[Tensor, "prompts tokens dim"], Float32[Tensor, "prompts pooled_dim"]]:
    readers = [
        PromptReader(
            plain_tokenizer(encoder),
            encoder.token_embedding.cpu().numpy(),
            text_spec(encoder),
            max_chunks=1,
            encoder=index,
        )
        for index, encoder in enumerate(model.encoders)
    ]
    inputs = [[reader.read(prompt, concepts) for prompt in prompts] for reader in readers]
    return PromptEncoder.of(model)(
        [torch.cat([torch.from_numpy(one.inputs_embeds) for one in rows]) for rows in inputs],
        [torch.cat([torch.from_numpy(one.eos_index) for one in rows]) for rows in inputs],
    )


def _noise(
    model: DiffusionModel, count: int, size: int, seed: int
) -> Float32[Tensor, "count channels height width"]:
    generator = torch.Generator().manual_seed(seed)
    side = size // model.scale_factor
    shape = (count, model.unet.config["in_channels"], side, side)
    return torch.randn(shape, generator=generator).to(model.unet.device)


def _decode(
    model: DiffusionModel, latents: Float32[Tensor, "count channels height width"]
) -> list[Image.Image]:
    decoded = latents / model.scaling_factor + model.shift_factor
    vae: Any = model.vae
    (pixels,) = vae.decode(decoded.to(vae.dtype), return_dict=False)
    levels = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).numpy()]


def png_bytes(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """One image with all of them in a row, from the left."""
    sheet = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet
