"""All text encoders of a model as one function of embeddings, as the denoiser sees them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.encoder_modules import TextEncoder
from trainer.model import DiffusionModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoder:
    """All text encoders of a model: their `prompt_embeds` side by side, the last one's `pooled`."""

    encoders: tuple[TextEncoder, ...]

    @classmethod
    def of(cls, model: DiffusionModel) -> Self:
        return cls(encoders=tuple(encoder.module() for encoder in model.encoders))

    def __call__(
        self,
        inputs_embeds: Sequence[Float[Tensor, "batch tokens _"]],
        eos_index: Sequence[Int64[Tensor, " batch"]],
    ) -> tuple[Float[Tensor, "batch tokens output_dim"], Float[Tensor, "batch pooled_dim"]]:
        """`inputs_embeds` and `eos_index` for each encoder, in any dtype and on any device."""
        outputs = [
            encoder(embeds.to(encoder.device, encoder.dtype), index.to(encoder.device))
            for encoder, embeds, index in zip(self.encoders, inputs_embeds, eos_index, strict=True)
        ]
        return torch.cat([prompt_embeds for prompt_embeds, _ in outputs], dim=-1), outputs[-1][1]
