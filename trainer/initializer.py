"""Where the new vectors start, and how long they are."""

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from trainer.errors import LearningError
from trainer.model import DiffusionModel, Encoder
from trainer.splicing import plain_tokenizer
from trainer.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

# Several vectors from one word would have the same gradient's direction for ever: a nudge, 1 % of
# their length, tells them apart.
_RELATIVE_NOISE = 0.01


def word_norm(model: DiffusionModel | Encoder) -> float:
    """The length that a word has for a text encoder: the median over the templates' words.

    They are common words, which the text encoder has seen in training. The median over the whole
    vocabulary is another matter: tokens that training never met keep the length they were
    initialized with. Of a model's encoders the first.
    """
    table = model.token_embedding
    words = " ".join(OBJECT_TEMPLATES + STYLE_TEMPLATES).replace("{}", "")
    token_ids = sorted(set(_encode(model, words)))
    return table[token_ids].norm(dim=1).median().item()


def initial_vectors(
    model: DiffusionModel,
    *,
    initializer_token: str | None,
    num_vectors: int,
    generator: torch.Generator,
) -> Float32[Tensor, "num_vectors dim"]:
    """The vectors that learning starts from: those for each text encoder side by side.

    None is longer than `word_norm` of its encoder. A phrase of exactly `num_vectors` tokens gives
    one vector each; any other phrase gives its mean to all of them. Without one: the mean of the
    vocabulary, the direction that all tokens share and that favours none. Raises `LearningError`
    for a phrase without tokens.
    """
    parts = [
        _initial_part(encoder, initializer_token, num_vectors, generator)
        for encoder in model.encoders
    ]
    return torch.cat(parts, dim=1)


def _initial_part(
    encoder: Encoder, initializer_token: str | None, num_vectors: int, generator: torch.Generator
) -> Float32[Tensor, "num_vectors dim"]:
    rows = _rows(encoder, initializer_token)
    if len(rows) != num_vectors:
        rows = rows.mean(dim=0, keepdim=True).repeat(num_vectors, 1)
    if num_vectors > 1:
        noise = torch.randn(rows.shape, generator=generator)
        rows = rows + _RELATIVE_NOISE * rows.norm(dim=1, keepdim=True) * _unit(noise)
    return shortened(rows, word_norm(encoder))


def shortened_parts(
    vectors: Float32[Tensor, "num_vectors all_dims"],
    dims: Sequence[int],
    max_norms: Sequence[float],
) -> Float32[Tensor, "num_vectors all_dims"]:
    """The vectors, the part for each text encoder no longer than the norm for that one."""
    parts = zip(vectors.split(list(dims), dim=1), max_norms, strict=True)
    return torch.cat([shortened(part, max_norm) for part, max_norm in parts], dim=1)


def shortened(
    vectors: Float32[Tensor, "num_vectors dim"], max_norm: float
) -> Float32[Tensor, "num_vectors dim"]:
    """The vectors, those longer than `max_norm` scaled back to it."""
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors * (max_norm / norms.clamp(min=max_norm))


def _rows(encoder: Encoder, initializer_token: str | None) -> Float32[Tensor, "tokens dim"]:
    table = encoder.token_embedding.cpu()
    if initializer_token is None:
        return table.mean(dim=0, keepdim=True)
    token_ids = _encode(encoder, initializer_token)
    if not token_ids:
        raise LearningError(
            f"initializer_token {initializer_token!r} has no tokens; give a word such as 'dog', or "
            "leave it out to start from the mean of the vocabulary"
        )
    return table[token_ids]


def _encode(model: DiffusionModel | Encoder, text: str) -> list[int]:
    return plain_tokenizer(model).encode(text, add_special_tokens=False).ids


def _unit(rows: Float32[Tensor, "rows dim"]) -> Float32[Tensor, "rows dim"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
