"""Where the new vectors start, and how long a word is."""

import torch
from jaxtyping import Float32
from torch import Tensor

from trainer.cross_initialization import text_encoder_output
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
    cross: bool = False,
) -> Float32[Tensor, "num_vectors all_dims"]:
    """The vectors that learning starts from: those for each text encoder side by side.

    `phrase_vectors`; several of them are nudged apart. Raises `LearningError` for a phrase without
    tokens, or with more than a text encoder can read where it must.
    """
    vectors = phrase_vectors(model, initializer_token, num_vectors, cross=cross)
    if num_vectors == 1:
        return vectors
    parts = vectors.split(model.dims, dim=1)
    return torch.cat([_nudged(part, generator) for part in parts], dim=1)


def phrase_vectors(
    model: DiffusionModel, phrase: str | None, num_vectors: int, *, cross: bool = False
) -> Float32[Tensor, "num_vectors all_dims"]:
    """A phrase as vectors: those for each text encoder side by side.

    A phrase of exactly `num_vectors` tokens gives one vector each; any other phrase gives its mean
    to all of them. Without one: the mean of the vocabulary, the direction that all tokens share and
    that favours none. With `cross` not the embeddings themselves, but what the text encoder makes
    of them. Raises `LearningError` for a phrase without tokens.
    """
    parts = [_phrase_part(encoder, phrase, num_vectors, cross) for encoder in model.encoders]
    return torch.cat(parts, dim=1)


def _phrase_part(
    encoder: Encoder, phrase: str | None, num_vectors: int, cross: bool
) -> Float32[Tensor, "num_vectors dim"]:
    rows = _rows(encoder, phrase)
    if cross:
        rows = text_encoder_output(encoder, rows)
    return rows if len(rows) == num_vectors else rows.mean(dim=0).repeat(num_vectors, 1)


def _nudged(
    rows: Float32[Tensor, "num_vectors dim"], generator: torch.Generator
) -> Float32[Tensor, "num_vectors dim"]:
    noise = torch.randn(rows.shape, generator=generator)
    return rows + _RELATIVE_NOISE * rows.norm(dim=1, keepdim=True) * _unit(noise)


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
