"""Image towers: the half of a CLIP that sees pictures, where a text encoder is its other half.

Stable Diffusion 1.x and the first text encoder of SDXL read with the text half of
openai/clip-vit-large-patch14, 2.x with that of OpenCLIP's ViT-H and the second of SDXL with that of
its ViT-bigG (laion/CLIP-ViT-H-14-laion2B-s32B-b79K, laion/CLIP-ViT-bigG-14-laion2B-39B-b160k).
With its tower, pictures and prompts become vectors of one space, and no denoiser is needed to say
how well a prompt fits.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainer.encoder_modules import ClipTextEncoder
from trainer.errors import LearningError
from trainer.evaluation_errors import EncoderError
from trainer.model import DiffusionModel, Encoder

if TYPE_CHECKING:
    from trainer.hub_encoders import ClipEncoder

# Of one rounding to bfloat16, half a unit in its eighth bit, either way; float16's is finer, but
# has a smallest step, 6e-8. Weights of another training differ in their first bits.
_RELATIVE_TOLERANCE = 2**-7
_ABSOLUTE_TOLERANCE = 1e-7
# Of the configs: two encoders with the same weights and another of these are not the same function.
_OPTIONS = ("hidden_act", "num_attention_heads", "layer_norm_eps")

Units = Float32[Tensor, "count dim"]  # rows of length 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTower:
    """A CLIP whose text half is one of a model's text encoders, in float32."""

    name: str  # as it was asked for
    identity: str  # what tells its weights from others: a digest, a revision
    encoder: int  # which of the model's text encoders is its text half
    clip: "ClipEncoder"

    def text_half(self) -> ClipTextEncoder:
        """The text half, with all its layers, as a function of embeddings.

        What it pools is projected to where pictures are.
        """
        return ClipTextEncoder(self.clip.model)

    def image_embeds(self, pixels: Float32[Tensor, "images 3 height width"]) -> Units:
        """Pictures in [-1, 1] as the tower sees them, in its own size."""
        levels = ((pixels.cpu() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pictures = list(levels.permute(0, 2, 3, 1).numpy())
        return self._units(self.clip.image_embeds(pictures))

    def text_embeds(self, sentences: Sequence[str]) -> Units:
        """Sentences as they are; raises `LearningError` for one that is too long."""
        try:
            return self._units(self.clip.text_embeds(sentences))
        except EncoderError as error:
            raise LearningError(str(error)) from error

    def _units(self, embeds: Float32[np.ndarray, "count dim"]) -> Units:
        units = nn.functional.normalize(torch.from_numpy(embeds), dim=1)
        if not units.isfinite().all():
            raise LearningError(
                f"the image tower {self.name} gives numbers that are not finite; its weights are "
                "broken: fetch it anew, or leave --image-tower out"
            )
        return units


def open_image_towers(names: Sequence[str], model: DiffusionModel) -> tuple[ImageTower, ...]:
    """The image towers of a model's text encoders, by folder or hub id, on the CPU.

    Raises `LearningError` for what cannot be read, is no CLIP, or belongs to another model.
    """
    towers: list[ImageTower] = []
    for name in names:
        tower = _open(name, model)
        for other in towers:
            if other.encoder == tower.encoder:
                raise LearningError(
                    f"the image towers {other.name} and {name} both belong to the model's "
                    f"{model.encoders[tower.encoder].name}; give one of them"
                )
        towers.append(tower)
    return tuple(towers)


@contextmanager
def lent(towers: Sequence[ImageTower], device: torch.device) -> Generator[None]:
    """Have the towers on a device for a while: large as they are, they are needed at first only."""
    try:
        for tower in towers:
            tower.clip.to(device)
        yield
    finally:
        for tower in towers:
            tower.clip.to(torch.device("cpu"))


def _open(name: str, model: DiffusionModel) -> ImageTower:
    # Takes a second to import, and most runs have no tower.
    from trainer.hub_encoders import ClipEncoder, open_hub_encoder

    try:
        clip = open_hub_encoder(name)
    except EncoderError as error:
        raise LearningError(f"--image-tower: {error}") from error
    if not isinstance(clip, ClipEncoder):
        raise LearningError(f"--image-tower {name} is a {clip.description.kind}; give a CLIP")
    return ImageTower(
        name=name,
        identity=clip.description.identity,
        encoder=_place_of(clip, model, name),
        clip=clip,
    )


def _place_of(clip: "ClipEncoder", model: DiffusionModel, name: str) -> int:
    """Which of the model's text encoders is the text half of a CLIP."""
    differences: list[str] = []
    for place, encoder in enumerate(model.encoders):
        difference = _difference(clip.model, encoder)
        if difference is None:
            return place
        differences.append(f"{encoder.name}: {difference}")
    raise LearningError(
        f"--image-tower {name} does not belong to {model.name}: its text half is not the model's "
        f"({'; '.join(differences)}); give the CLIP that the model reads text with, or none"
    )


def _difference(clip: Any, encoder: Encoder) -> str | None:
    """In words, what of a text encoder the text half of a CLIP does not have; None: has all.

    The CLIP may have layers behind the encoder's last: Stable Diffusion 2.x leaves its last one
    out.
    """
    if not isinstance(encoder.text_encoder, CLIPTextModel | CLIPTextModelWithProjection):
        return f"it is a {type(encoder.text_encoder).__name__}, which has no image tower"
    own, theirs = _text_weights(encoder.text_encoder), _text_weights(clip)
    for option in _OPTIONS:
        wanted = getattr(encoder.text_encoder.config, option)
        found = getattr(clip.config.text_config, option)
        if wanted != found:
            return f"{option} is {found!r}, the model's {wanted!r}"
    for weight_name, wanted in own.items():
        found = theirs.get(weight_name)
        if found is None:
            return f"it has no {weight_name}"
        if found.shape != wanted.shape:
            return f"{weight_name} is {tuple(found.shape)}, the model's {tuple(wanted.shape)}"
        if not torch.allclose(
            found,
            wanted.float().cpu(),
            rtol=_RELATIVE_TOLERANCE,
            atol=_ABSOLUTE_TOLERANCE,
        ):
            return f"the values of {weight_name} differ"
    return None


def _text_weights(model: Any) -> Mapping[str, Tensor]:
    """The weights of a text encoder, or of a CLIP's text half, by the same names."""
    # transformers 5.6 took `.text_model` out of CLIPTextModel, left it in the projecting one.
    weights = dict(getattr(model, "text_model", model).state_dict())
    if hasattr(model, "text_projection"):
        weights["text_projection"] = model.text_projection.weight
    return weights
