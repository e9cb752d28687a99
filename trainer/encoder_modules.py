"""Text encoders from embeddings instead of token ids: where a concept's vectors come in."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

# Added to attention scores that must not count. The largest float16 is enough in float32 as well
# (exp(-65504) is 0) and, unlike float32's own, is no infinity after `.half()`.
_MASKED = -65504.0


class TextEncoder(nn.Module, ABC):
    """What all text encoders have in common: learned positions, and their two inputs and outputs.

    They share the modules of a model, freeze them and put them in eval mode; gradients still flow
    to `inputs_embeds`.
    """

    position_embedding: nn.Embedding

    @property
    def dtype(self) -> torch.dtype:
        return self.position_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.position_embedding.weight.device

    @property
    def max_tokens(self) -> int:
        """Positions of the encoder, the tokens of begin and end included."""
        return self.position_embedding.num_embeddings

    @property
    def pooled_dim(self) -> int:
        """Width of `pooled`."""
        return self.position_embedding.embedding_dim

    @abstractmethod
    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch tokens dim"],
        eos_index: Int64[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch tokens output_dim"], Float[Tensor, "batch pooled_dim"]]:
        """`prompt_embeds`, which the denoiser reads, and the prompt as one vector.

        `inputs_embeds` are rows of the token-embedding table or learned vectors, without positions;
        `eos_index` says where each prompt ends.
        """

    def _positioned(
        self, inputs_embeds: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return inputs_embeds + self.position_embedding.weight[: inputs_embeds.shape[1]]


class ClipTextEncoder(TextEncoder):
    """`CLIPTextModel` for `inputs_embeds`, which its own `forward` refuses.

    Pools at `eos_index`: transformers' `input_ids.argmax()` for configs with `eos_token_id == 2`
    (Stable Diffusion 1.x) finds a placeholder that was added to the vocabulary instead of EOS.

    With `penultimate`, `prompt_embeds` are the hidden states before the last layer, without the
    final norm: `hidden_states[-2]`, which SDXL reads. What is pooled goes through all layers, and
    through the projection of a model that has one.
    """

    causal_mask: Tensor
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
        positions = self.max_tokens
        mask = torch.full((positions, positions), _MASKED, dtype=self.dtype).triu(1)
        self.register_buffer("causal_mask", mask.to(self.device), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def pooled_dim(self) -> int:
        """Width of `pooled`, after the projection."""
        return getattr(self.text_projection, "out_features", self.position_embedding.embedding_dim)

    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch tokens dim"],
        eos_index: Int64[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch tokens output_dim"], Float[Tensor, "batch pooled_dim"]]:
        """Hidden states, and the (projected) one at `eos_index`; see `TextEncoder.forward`."""
        tokens = inputs_embeds.shape[1]
        before = hidden_states = self._positioned(inputs_embeds)
        for layer in self.layers:
            before = hidden_states
            hidden_states = layer(hidden_states, self.causal_mask[:tokens, :tokens])
        last = self.final_layer_norm(hidden_states)
        pooled = self.text_projection(_at(last, eos_index))
        return before if self.penultimate else last, pooled


class LdmBertTextEncoder(TextEncoder):
    """The encoder of `LDMBertModel`, without the head on it that predicts words.

    Every position attends to all 77, padding included: the model was trained without a mask, and
    `LDMTextToImagePipeline` gives it none. It has nothing that pools either. `pooled` is the hidden
    state at `eos_index`, so that all text encoders have the same graph; no denoiser reads it.
    """

    layers: nn.ModuleList
    layer_norm: nn.LayerNorm

    def __init__(self, model: LDMBertModel) -> None:
        super().__init__()
        self.position_embedding = model.model.embed_positions
        self.layers = model.model.layers
        self.layer_norm = model.model.layer_norm
        self.requires_grad_(False).eval()

    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch tokens dim"],
        eos_index: Int64[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch dim"]]:
        """The normed hidden states, and the one at `eos_index`; see `TextEncoder.forward`."""
        hidden_states = self._positioned(inputs_embeds)
        for layer in self.layers:
            (hidden_states,) = layer(hidden_states, attention_mask=None, layer_head_mask=None)
        prompt_embeds = self.layer_norm(hidden_states)
        return prompt_embeds, _at(prompt_embeds, eos_index)


def _at(
    hidden_states: Float[Tensor, "batch tokens dim"], index: Int64[Tensor, " batch"]
) -> Float[Tensor, "batch dim"]:
    """The hidden state at one position of each row."""
    expanded = index[:, None, None].expand(-1, 1, hidden_states.shape[-1])
    return hidden_states.gather(1, expanded).squeeze(1)
