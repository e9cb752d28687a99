"""CLIP's text encoder from embeddings instead of token ids: where a concept's vectors come in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainer.model import DiffusionModel

# Added to attention scores that must not count. The largest float16 is enough in float32 as well
# (exp(-65504) is 0) and, unlike float32's own, is no infinity after `.half()`.
_MASKED = -65504.0


class TextEncoder(nn.Module):
    """`CLIPTextModel` for `inputs_embeds`, which its own `forward` refuses.

    Shares the modules of `model`, freezes them and puts them in eval mode; gradients still flow to
    `inputs_embeds`. Pools at `eos_index`: transformers' `input_ids.argmax()` for configs with
    `eos_token_id == 2` (Stable Diffusion 1.x) finds a placeholder that was added to the vocabulary
    instead of EOS.

    With `penultimate`, `prompt_embeds` are the hidden states before the last layer, without the
    final norm: `hidden_states[-2]`, which SDXL reads. What is pooled goes through all layers.
    """

    causal_mask: Tensor
    position_embedding: nn.Embedding
    layers: nn.ModuleList
    final_layer_norm: nn.LayerNorm
    text_projection: nn.Linear | nn.Identity

    def __init__(
        self, model: CLIPTextModel | CLIPTextModelWithProjection, *, penultimate: bool = False
    ) -> None:
        super().__init__()
        self.penultimate = penultimate
        # transformers 5.6 took `.text_model` out of CLIPTextModel, left it in the projecting one.
        core: Any = getattr(model, "text_model", model)
        self.position_embedding = core.embeddings.position_embedding
        self.layers = core.encoder.layers
        self.final_layer_norm = core.final_layer_norm
        self.text_projection = getattr(model, "text_projection", nn.Identity())
        positions = self.position_embedding.num_embeddings
        mask = torch.full((positions, positions), _MASKED, dtype=self.dtype).triu(1)
        self.register_buffer("causal_mask", mask.to(self.device), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.position_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.position_embedding.weight.device

    @property
    def max_tokens(self) -> int:
        """Positions of the encoder, BOS and EOS included."""
        return self.position_embedding.num_embeddings

    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch tokens dim"],
        eos_index: Int64[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch tokens output_dim"], Float[Tensor, "batch pooled_dim"]]:
        """`prompt_embeds` and the embedding at `eos_index` (projected, if the model projects).

        `inputs_embeds` are rows of the token-embedding table or learned vectors, without positions.
        """
        tokens = inputs_embeds.shape[1]
        before = hidden_states = inputs_embeds + self.position_embedding.weight[:tokens]
        for layer in self.layers:
            before = hidden_states
            hidden_states = layer(hidden_states, self.causal_mask[:tokens, :tokens])
        last = self.final_layer_norm(hidden_states)
        index = eos_index[:, None, None].expand(-1, 1, last.shape[-1])
        pooled = self.text_projection(last.gather(1, index).squeeze(1))
        return before if self.penultimate else last, pooled


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoder:
    """All text encoders of a model: their `prompt_embeds` side by side, the last one's `pooled`."""

    encoders: tuple[TextEncoder, ...]

    @classmethod
    def of(cls, model: DiffusionModel) -> Self:
        penultimate = model.family.penultimate
        encoders = (TextEncoder(e.text_encoder, penultimate=penultimate) for e in model.encoders)
        return cls(encoders=tuple(encoders))

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
