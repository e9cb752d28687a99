"""What a caller can ask for, and what it is told: plain values, checked once."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from engine.bundle import Manifest
from engine.concepts import Concept
from engine.errors import ConfigError, InvalidRequest, quoted
from engine.guidance import GuidedCalls
from engine.samplers import SamplerTable, Trajectory

MAX_SEED = 2**64 - 1
MAX_GUIDANCE_SCALE = 100.0
MAX_PRIORITY = 9
MAX_REQUEST_ID_CHARACTERS = 64

RgbImage = UInt8[np.ndarray, "height width 3"]

# Attention needs memory with the square of the area, so the limit follows the size that the model
# was trained at; one megapixel is enough for the family at any size.
_MAX_SIDES = 4
_MOST_PIXELS = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask of this server."""

    max_images_per_request: int = 16  # of one prompt
    max_side: int = 2048  # pixels, of width and of height
    max_pixels: int | None = None  # width * height; None: chosen for the model
    max_inline_concept_bytes: int = 64 << 10  # of one concept that is sent along
    max_concepts_per_request: int = 32  # stored and sent along

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")

    def for_model(self, manifest: Manifest) -> "Limits":
        """With `max_pixels` known: 16 times the model's own area, at most one megapixel."""
        if self.max_pixels is not None:
            return self
        largest = min((_MAX_SIDES * manifest.latents.default_size) ** 2, _MOST_PIXELS)
        return dataclasses.replace(self, max_pixels=largest)


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
    # Guided is between these shares of the denoiser calls of an image; the others have one row.
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    init_image: RgbImage | None = None  # image-to-image where given
    strength: float = 0.8  # share of the schedule that image-to-image runs
    preview_every: int = 0  # steps between previews; 0 = none


def check_request(
    request: GenerationRequest,
    *,
    manifest: Manifest,
    samplers: dict[str, SamplerTable],
    limits: Limits,
) -> tuple[int, int, Trajectory]:
    """Raise `InvalidRequest` for what cannot be served; return width, height and coefficients."""
    _check_guidance(request)
    _in_range("num_images", request.num_images, 1, limits.max_images_per_request)
    _in_range("seed", request.seed, 0, MAX_SEED)
    _in_range("preview_every", request.preview_every, 0, 1000)
    _in_range("concepts", len(request.concepts), 0, limits.max_concepts_per_request)
    width, height = _size(request, manifest)
    _check_size(request, width, height, manifest.latents.size_multiple, limits)
    trajectory = _trajectory(request, samplers)
    _check_guided_calls(request, len(trajectory.rows))
    return width, height, trajectory


def _check_guidance(request: GenerationRequest) -> None:
    guidance, start, end = request.guidance_scale, request.guidance_start, request.guidance_end
    if not math.isfinite(guidance) or not 0.0 <= guidance <= MAX_GUIDANCE_SCALE:
        raise InvalidRequest(
            f"guidance_scale must be between 0 and {MAX_GUIDANCE_SCALE:g}, got {guidance}",
            field="guidance_scale",
        )
    if not 0.0 <= start < end <= 1.0:  # NaN is in no order
        raise InvalidRequest(
            "guidance_start and guidance_end must be shares of the schedule, 0 <= start < end <= "
            f"1, got {start:g} and {end:g}; guidance_scale 1 turns guidance off",
            field="guidance_start",
        )
    if guidance == 1.0 and (start, end) != (0.0, 1.0):
        raise InvalidRequest(
            f"guidance_scale is 1, so that there is no guidance to limit to {start:g} to {end:g}; "
            "raise it, or leave guidance_start and guidance_end out",
            field="guidance_start",
        )


def _check_guided_calls(request: GenerationRequest, num_calls: int) -> None:
    start, end = request.guidance_start, request.guidance_end
    if not GuidedCalls.between(start, end, num_calls).num_left(0):
        raise InvalidRequest(
            f"none of the {num_calls} denoiser calls lies between guidance_start {start:g} and "
            f"guidance_end {end:g}; they must be further apart",
            field="guidance_start",
        )


def _trajectory(request: GenerationRequest, samplers: dict[str, SamplerTable]) -> Trajectory:
    if request.sampler not in samplers:
        raise InvalidRequest(
            f"unknown sampler {quoted(request.sampler)}; known: {', '.join(sorted(samplers))}",
            field="sampler",
        )
    strength = request.strength if request.init_image is not None else 1.0
    return samplers[request.sampler].trajectory(request.num_inference_steps, strength)


def _size(request: GenerationRequest, manifest: Manifest) -> tuple[int, int]:
    width = height = manifest.latents.default_size
    if request.init_image is not None:
        multiple = manifest.latents.size_multiple
        height, width = (side // multiple * multiple for side in request.init_image.shape[:2])
    return (
        width if request.width is None else request.width,
        height if request.height is None else request.height,
    )


def _check_size(
    request: GenerationRequest, width: int, height: int, multiple: int, limits: Limits
) -> None:
    assert limits.max_pixels is not None, "Limits.for_model has not been called"
    hint = ""
    if request.init_image is not None and None in (request.width, request.height):
        found = " x ".join(str(side) for side in request.init_image.shape[1::-1])
        hint = f" (the initial image is {found}; name width and height, and it is scaled to them)"
    for name, value in (("width", width), ("height", height)):
        _in_range(name, value, multiple, limits.max_side, hint)
        if value % multiple:
            raise InvalidRequest(
                f"{name} must be a multiple of {multiple}, got {value}; "
                f"use {value // multiple * multiple}",
                field=name,
            )
    if width * height > limits.max_pixels:
        raise InvalidRequest(
            f"width x height must be at most {limits.max_pixels} pixels, "
            f"got {width} x {height}{hint}",
            field="width",
        )


def _in_range(name: str, value: int, low: int, high: int, hint: str = "") -> None:
    if not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be between {low} and {high}, got {value}{hint}", field=name
        )


def check_priority(priority: int) -> None:
    """Raise `InvalidRequest` for one out of range."""
    if not 0 <= priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be between 0 and {MAX_PRIORITY}, got {priority}", field="priority"
        )


def check_request_id(request_id: str) -> None:
    """Raise `InvalidRequest` for what is no id; the empty one means that there is none."""
    printable = request_id.isascii() and request_id.isprintable()
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not printable:
        raise InvalidRequest(
            f"request_id must have at most {MAX_REQUEST_ID_CHARACTERS} characters of printable "
            f"ASCII, got {quoted(request_id)}; a UUID will do",
            field="request_id",
        )
