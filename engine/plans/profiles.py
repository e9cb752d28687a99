"""Resolution buckets: one optimization profile for each, and which of them takes given shapes.

TensorRT tunes its kernels for the optimal shape of a profile and allocates for the largest, so one
wide range is slow far from its middle and holds memory for sizes that nobody asks for. Rows stay
dynamic in every profile, because images come and go between steps.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.bundle import ComponentSpec, LatentSpec, Manifest
from engine.errors import ConfigError

ShapeRange = tuple[list[int], list[int], list[int]]  # smallest, optimal, largest
Profile = dict[str, ShapeRange]  # input -> shapes that it takes

# Smallest, most usual and largest length of axes that have nothing to do with the resolution.
_TEXT = (1, 2, 8)
_BATCHES = {
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
    "vae_decoder": (1, 1, 4),
    "vae_encoder": (1, 1, 4),
    "decoder_input": (1, 1, 4),
}
ROWS = (1, 2, 16)
SLOTS = (1, 8, 64)  # images whose latents are kept on the device
ROWS_PER_IMAGE = 2
MAX_CHUNKS = 3  # prompt chunks that a plan's denoiser takes at most

_BUCKET = re.compile(r"(\d+)(?:x(\d+))?(?:-(\d+)(?:x(\d+))?)?")


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Image sizes that share a profile, in pixels; the two are equal where it is one size."""

    smallest: tuple[int, int]  # width, height
    largest: tuple[int, int]

    def __str__(self) -> str:
        low, high = (f"{width}x{height}" for width, height in (self.smallest, self.largest))
        return low if low == high else f"{low}-{high}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Read `512`, `512x768`, `256-768` or `256x256-768x512`: width x height, in pixels."""
        match = _BUCKET.fullmatch(text.strip().lower())
        if not match:
            raise ConfigError(
                f"bucket {text!r} is no size; write 512x768 (width x height in pixels), or "
                "256x256-768x768 for all sizes from the one to the other"
            )
        width, height, most_width, most_height = match.groups()
        low = (int(width), int(height or width))
        high = low if most_width is None else (int(most_width), int(most_height or most_width))
        if low[0] > high[0] or low[1] > high[1]:
            raise ConfigError(f"bucket {text!r} ends below its beginning; write the smaller first")
        return cls(low, high)


def buckets_of(latents: LatentSpec, wanted: Sequence[str] = ()) -> tuple[Bucket, ...]:
    """The buckets that were asked for, or the model's own: its size, and half to 1.5 times that.

    Raises `ConfigError` for a size that the model cannot draw.
    """
    if not wanted:
        multiple, usual = latents.size_multiple, latents.default_size
        low = max(usual // 2 // multiple * multiple, multiple)
        high = -(-3 * usual // (2 * multiple)) * multiple
        return (Bucket((usual, usual), (usual, usual)), Bucket((low, low), (high, high)))
    buckets = tuple(dict.fromkeys(Bucket.parse(text) for text in wanted))
    for bucket in buckets:
        for side in (*bucket.smallest, *bucket.largest):
            if side < 1 or side % latents.size_multiple:
                raise ConfigError(
                    f"bucket {bucket}: {side} is no multiple of {latents.size_multiple} pixels, "
                    "as this model's sizes are"
                )
    return buckets


def profiles_of(
    component: str, spec: ComponentSpec, manifest: Manifest, buckets: Sequence[Bucket]
) -> list[Profile]:
    """A profile for each bucket; one where the inputs have nothing to do with the resolution."""
    sized = any(axis in ("height", "width") for t in spec.inputs for axis in t.shape)
    return [
        _profile(component, spec, manifest, bucket)
        for bucket in (buckets if sized else buckets[:1])
    ]


def _profile(component: str, spec: ComponentSpec, manifest: Manifest, bucket: Bucket) -> Profile:
    ranges = _axis_ranges(component, manifest, bucket)
    return {
        tensor.name: (
            _lengths(tensor.shape, ranges, 0),
            _lengths(tensor.shape, ranges, 1),
            _lengths(tensor.shape, ranges, 2),
        )
        for tensor in spec.inputs
    }


def _axis_ranges(
    component: str, manifest: Manifest, bucket: Bucket
) -> dict[str, tuple[int, int, int]]:
    latents, tokens = manifest.latents, manifest.text.max_tokens
    unit = 1 if component == "vae_encoder" else latents.scale_factor  # pixels per length
    least, most, prompts = *SLOTS[::2], ROWS_PER_IMAGE
    return {
        "batch": _BATCHES.get(component, (1, 1, 4)),
        "rows": ROWS,
        "slots": SLOTS,
        "prompts": (least * prompts, SLOTS[1] * prompts, most * prompts),
        "tokens": (tokens, tokens, MAX_CHUNKS * tokens),
        **{
            axis: (
                bucket.smallest[which] // unit,
                _usual(bucket.smallest[which], bucket.largest[which], latents) // unit,
                bucket.largest[which] // unit,
            )
            for which, axis in enumerate(("width", "height"))
        },
    }


def _usual(smallest: int, largest: int, latents: LatentSpec) -> int:
    """The size to tune for: the model's own, or what of the bucket is nearest to it."""
    return min(max(latents.default_size, smallest), largest)


def _lengths(
    shape: Sequence[int | str], ranges: Mapping[str, tuple[int, int, int]], which: int
) -> list[int]:
    return [ranges[axis][which] if isinstance(axis, str) else axis for axis in shape]


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The narrowest profile that takes these shapes, by the elements of its largest inputs.

    The first of equals; None where none does.
    """
    fitting = [index for index, profile in enumerate(profiles) if _takes(profile, shapes)]
    return min(fitting, key=lambda index: (_elements(profiles[index]), index), default=None)


def _takes(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> bool:
    return profile.keys() == shapes.keys() and all(
        len(shape) == len(profile[name][0])
        and all(
            low <= length <= high
            for low, length, high in zip(profile[name][0], shape, profile[name][2], strict=True)
        )
        for name, shape in shapes.items()
    )


def _elements(profile: Profile) -> int:
    return sum(math.prod(largest) for _, _, largest in profile.values())
