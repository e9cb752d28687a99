"""Template prompts with slots for the new vectors, laid out by the engine's own prompt reader."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float32, Int64
from tokenizers import Tokenizer
from torch import Tensor

from engine.bundle import TextSpec
from engine.concepts import Concept
from engine.fingerprint import embedding_fingerprint
from engine.prompts import EncoderInput, PromptReader
from trainer.errors import LearningError
from trainer.model import DiffusionModel

# Holds the slots while templates are laid out; the name of the real concept does not matter there.
_STAND_IN = "<concept>"


def text_spec(model: DiffusionModel) -> TextSpec:
    """What the engine's prompt reader must know of the model's text encoder."""
    vocab_size, dim = model.token_embedding.shape
    tokenizer: Any = model.tokenizer  # annotated for lists of tokens as well
    return TextSpec(
        max_tokens=model.max_tokens,
        dim=dim,
        output_dim=int(model.text_encoder.config.hidden_size),
        vocab_size=vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        embedding_fingerprint=embedding_fingerprint(model.token_embedding.cpu().numpy()),
    )


def plain_tokenizer(model: DiffusionModel) -> Tokenizer:
    """A copy of the model's fast tokenizer that neither pads nor truncates, as the reader wants it.

    A `tokenizer.json` may store a padding length, which would then count as text.
    """
    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePrompts:
    """Templates as encoder inputs: fixed rows of the vocabulary, and where the vectors go."""

    frozen_embeds: Float32[Tensor, "templates tokens dim"]
    slots: Int64[Tensor, "templates num_vectors"]  # positions of the vectors
    eos_index: Int64[Tensor, " templates"]

    @classmethod
    def lay_out(cls, model: DiffusionModel, templates: Sequence[str], num_vectors: int) -> Self:
        """Lay out each template once. Raises `LearningError` if one is too long for the encoder."""
        table = model.token_embedding.cpu().numpy()
        text = text_spec(model)
        reader = PromptReader(plain_tokenizer(model), table, text)
        stand_in = Concept(
            placeholder_token=_STAND_IN,
            learned_embeddings=np.zeros((num_vectors, text.dim), np.float32),
        )
        prompts = [template.format(_STAND_IN) for template in templates]
        inputs = [reader.read(prompt, [stand_in]) for prompt in prompts]
        for prompt, encoder_input in zip(prompts, inputs, strict=True):
            _check_one_chunk(prompt, encoder_input, num_vectors, text.max_tokens)
        first = torch.tensor([encoder_input.slots[0][1] for encoder_input in inputs])
        return cls(
            frozen_embeds=torch.from_numpy(np.concatenate([i.inputs_embeds for i in inputs])),
            slots=first[:, None] + torch.arange(num_vectors),
            eos_index=torch.from_numpy(np.concatenate([i.eos_index for i in inputs])),
        )

    def __len__(self) -> int:
        return len(self.frozen_embeds)

    def splice(
        self, vectors: Float32[Tensor, "num_vectors dim"], which: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch tokens dim"]:
        """The chosen templates with `vectors` in their slots; differentiable in `vectors` alone."""
        rows = torch.arange(len(which), device=which.device)[:, None].expand_as(self.slots[which])
        values = vectors.expand(len(which), *vectors.shape)
        return self.frozen_embeds[which].index_put((rows, self.slots[which]), values)

    def to(self, device: torch.device) -> Self:
        return type(self)(
            frozen_embeds=self.frozen_embeds.to(device),
            slots=self.slots.to(device),
            eos_index=self.eos_index.to(device),
        )


def _check_one_chunk(
    prompt: str, encoder_input: EncoderInput, num_vectors: int, max_tokens: int
) -> None:
    report = encoder_input.report
    if report.num_chunks > 1 or report.cut:
        words = report.num_tokens - num_vectors
        raise LearningError(
            f"num_vectors={num_vectors} leaves no room for the template {prompt!r}: the text "
            f"encoder has {max_tokens - 2} places, the words need {words}; "
            f"use num_vectors of at most {max_tokens - 2 - words}"
        )
