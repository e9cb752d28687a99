"""Cross Initialization (arXiv 2312.15905): learning starts from what the text encoder gives out.

A learned vector ends much longer than any word, and closer to the text encoder's output than to
its input, the authors find; so that is where they start. Input and output have one width in every
family that is supported.
"""

from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from trainer.errors import LearningError
from trainer.model import Encoder


@torch.no_grad()
def text_encoder_output(
    encoder: Encoder, rows: Float32[Tensor, "tokens dim"]
) -> Float32[Tensor, "tokens dim"]:
    """What the denoiser reads at the places of `rows`, a phrase's embeddings, in a prompt of it
    alone.

    Hidden states after the final layer norm; of SDXL's encoders those before the last layer, which
    have had none. Raises `LearningError` for a phrase that does not fit into the text encoder.
    """
    places = encoder.max_tokens - 2
    if len(rows) > places:
        raise LearningError(
            f"the initializer has {len(rows)} tokens, the text encoder {places} places; "
            "give a shorter one"
        )
    module = encoder.module()
    embeds = _prompt(encoder, rows).to(module.device, module.dtype)
    eos_index = torch.tensor([len(rows) + 1], device=module.device)
    prompt_embeds, _ = module(embeds, eos_index)
    return prompt_embeds[0, 1 : len(rows) + 1].float().cpu()


def _prompt(
    encoder: Encoder, rows: Float32[Tensor, "tokens dim"]
) -> Float32[Tensor, "1 max_tokens dim"]:
    """Begin, phrase, end, padding: a text encoder without a mask sees the padding as well."""
    tokenizer: Any = encoder.tokenizer  # annotated for lists of tokens as well
    table = encoder.token_embedding.cpu()
    ids = torch.full((encoder.max_tokens,), tokenizer.pad_token_id)
    ids[0], ids[len(rows) + 1] = encoder.bos_token_id, encoder.eos_token_id
    embeds = table[ids]
    embeds[1 : len(rows) + 1] = rows
    return embeds[None]
