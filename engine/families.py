"""What a family of models adds to the path that all share: more inputs of the denoiser.

Nothing here asks which family a bundle is of. A denoiser says itself, by the inputs that its graph
has in the manifest, what it takes beside latents, timestep and prompt; this is the one place in the
engine that knows how to fill them. docs/families.md tells how a family plugs in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from engine.bundle import Manifest
from engine.errors import BundleError

COMMON_INPUTS = ("latents", "timestep", "prompt_embeds")
NUM_TIME_IDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What is known of an image's rows beside the text: all that added inputs are made of."""

    pooled: Float32[np.ndarray, "rows pooled_dim"]  # of the last text encoder, one for each prompt
    width: int  # pixels
    height: int


def time_ids(width: int, height: int) -> tuple[float, ...]:
    """SDXL's size conditioning (arXiv 2307.01952, section 2.2), as its diffusers pipelines fill it.

    The size that the picture had, where it was cropped, and the size that is wanted; each as
    height or top, then width or left, in pixels. Whole pictures of the wanted size.
    """
    return (float(height), float(width), 0.0, 0.0, float(height), float(width))


def _text_embeds(conditioning: Conditioning) -> Float32[np.ndarray, "rows width"]:
    return conditioning.pooled


def _time_ids(conditioning: Conditioning) -> Float32[np.ndarray, "rows 6"]:
    ids = np.array(time_ids(conditioning.width, conditioning.height), np.float32)
    return np.tile(ids, (len(conditioning.pooled), 1))


_FILLED_BY: dict[str, Callable[[Conditioning], np.ndarray]] = {
    "text_embeds": _text_embeds,
    "time_ids": _time_ids,
}


def added_input_names(manifest: Manifest) -> tuple[str, ...]:
    """What the denoiser takes beside latents, timestep and prompt.

    Raises `BundleError` for an input that nobody here can fill.
    """
    denoiser = manifest.components.get("denoiser")
    names = [tensor.name for tensor in denoiser.inputs] if denoiser else []
    added = tuple(name for name in names if name not in COMMON_INPUTS)
    if unknown := [name for name in added if name not in _FILLED_BY]:
        raise BundleError(
            f"the denoiser of model {manifest.model_name!r} takes {', '.join(unknown)}, this "
            f"version can fill {', '.join(_FILLED_BY)}; build the bundle again with this version"
        )
    return added


def fill_added_inputs(
    names: Sequence[str], conditioning: Conditioning
) -> dict[str, Float32[np.ndarray, "rows _"]]:
    """The added inputs of an image, one row for each of its prompts."""
    return {name: _FILLED_BY[name](conditioning) for name in names}
