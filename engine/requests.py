"""What a caller can ask for, and what it is told: plain values, checked once."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from engine.bundle import Manifest
from engine.concepts import Concept
from engine.errors import InvalidRequest
from engine.samplers import SamplerTable

MAX_SEED = 2**64 - 1
MAX_GUIDANCE_SCALE = 100.0

RgbImage = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask of this server."""

    max_images_per_request: int = 16
    max_side: int = 2048  # pixels
    max_pixels: int = 1024 * 1024  # width * height
    max_inline_concept_bytes: int = 64 << 10
    max_concepts_per_request: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request for images, in the words of diffusers' Stable Diffusion pipelines."""

    prompt: str
    negative_prompt: str = ""
    concepts: tuple[Concept, ...] = ()
    width: int | None = None  # pixels; None: the model's own size, or the initial image's
    height: int | None = None
    num_images: int = 1  # image i uses seed + i
    seed: int = 0
    sampler: str = "ddim"
    num_inference_steps: int = 25
    guidance_scale: float = 7.5  # uncond + s (cond - uncond); 1 = off
    init_image: RgbImage | None = None  # image-to-image where given
    strength: float = 0.8  # share of the schedule that image-to-image runs
    preview_every: int = 0  # steps between previews; 0 = none


def check_request(
    request: GenerationRequest,
    *,
    manifest: Manifest,
    samplers: dict[str, SamplerTable],
    limits: Limits,
) -> tuple[int, int]:
    """Raise `InvalidRequest` for what cannot be served; return (width, height) in pixels."""
    _check_sampling(request, samplers)
    _in_range("num_images", request.num_images, 1, limits.max_images_per_request)
    _in_range("seed", request.seed, 0, MAX_SEED)
    _in_range("preview_every", request.preview_every, 0, 1000)
    _in_range("concepts", len(request.concepts), 0, limits.max_concepts_per_request)
    width, height = _size(request, manifest)
    multiple = manifest.latents.size_multiple
    for name, value in (("width", width), ("height", height)):
        _in_range(name, value, multiple, limits.max_side)
        if value % multiple:
            raise InvalidRequest(
                f"{name} must be a multiple of {multiple}, got {value}; "
                f"use {max(value // multiple * multiple, multiple)}",
                field=name,
            )
    if width * height > limits.max_pixels:
        raise InvalidRequest(
            f"width x height must be at most {limits.max_pixels} pixels, got {width} x {height}",
            field="width",
        )
    return width, height


def _check_sampling(request: GenerationRequest, samplers: dict[str, SamplerTable]) -> None:
    if request.sampler not in samplers:
        raise InvalidRequest(
            f"unknown sampler {request.sampler!r}; known: {', '.join(sorted(samplers))}",
            field="sampler",
        )
    guidance = request.guidance_scale
    if not math.isfinite(guidance) or not 0.0 <= guidance <= MAX_GUIDANCE_SCALE:
        raise InvalidRequest(
            f"guidance_scale must be between 0 and {MAX_GUIDANCE_SCALE:g}, got {guidance}",
            field="guidance_scale",
        )
    strength = request.strength if request.init_image is not None else 1.0
    samplers[request.sampler].trajectory(request.num_inference_steps, strength)


def _size(request: GenerationRequest, manifest: Manifest) -> tuple[int, int]:
    width = height = manifest.latents.default_size
    if request.init_image is not None:
        multiple = manifest.latents.size_multiple
        height, width = (side // multiple * multiple for side in request.init_image.shape[:2])
    return (
        width if request.width is None else request.width,
        height if request.height is None else request.height,
    )


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, got {value}", field=name)
