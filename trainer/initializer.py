"""Where the new vectors start, and how long they are."""

import torch
from jaxtyping import Float32
from torch import Tensor

from trainer.errors import LearningError
from trainer.model import DiffusionModel
from trainer.splicing import plain_tokenizer
from trainer.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

# Several vectors from one word would have the same gradient's direction for ever: a nudge, 1 % of
# their length, tells them apart.
_RELATIVE_NOISE = 0.01


def word_norm(model: DiffusionModel) -> float:
    """The length that a word has in this model: the median over the templates' words.

    They are common words, which the text encoder has seen in training. The median over the whole
    vocabulary is another matter: tokens that training never met keep the length they were
    initialized with.
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
    """The vectors that learning starts from, none longer than `word_norm`.

    A phrase of exactly `num_vectors` tokens gives one vector each; any other phrase gives its mean
    to all of them. Without a phrase: the mean of the vocabulary, the direction that all tokens
    share and that favours none. Raises `LearningError` for a phrase without tokens.
    """
    rows = _rows(model, initializer_token)
    if len(rows) != num_vectors:
        rows = rows.mean(dim=0, keepdim=True).repeat(num_vectors, 1)
    if num_vectors > 1:
        noise = torch.randn(rows.shape, generator=generator)
        rows = rows + _RELATIVE_NOISE * rows.norm(dim=1, keepdim=True) * _unit(noise)
    return shortened(rows, word_norm(model))


def shortened(
    vectors: Float32[Tensor, "num_vectors dim"], max_norm: float
) -> Float32[Tensor, "num_vectors dim"]:
    """The vectors, those longer than `max_norm` scaled back to it."""
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors * (max_norm / norms.clamp(min=max_norm))


def _rows(model: DiffusionModel, initializer_token: str | None) -> Float32[Tensor, "tokens dim"]:
    table = model.token_embedding.cpu()
    if initializer_token is None:
        return table.mean(dim=0, keepdim=True)
    token_ids = _encode(model, initializer_token)
    if not token_ids:
        raise LearningError(
            f"initializer_token {initializer_token!r} has no tokens; give a word such as 'dog', or "
            "leave it out to start from the mean of the vocabulary"
        )
    return table[token_ids]


def _encode(model: DiffusionModel, text: str) -> list[int]:
    return plain_tokenizer(model).encode(text, add_special_tokens=False).ids


def _unit(rows: Float32[Tensor, "rows dim"]) -> Float32[Tensor, "rows dim"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
