"""Template prompts with slots for the new vectors, laid out by the engine's own prompt reader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float32, Int64
from tokenizers import Tokenizer
from torch import Tensor

from engine.bundle import TextSpec
from engine.concepts import MAX_NUM_VECTORS, Concept
from engine.fingerprint import embedding_fingerprint
from engine.prompts import EncoderInput, PromptReader
from trainer.errors import LearningError
from trainer.model import DiffusionModel, Encoder

# Hold the slots while templates are laid out; the names of the real concepts do not matter there.
_STAND_IN = "<concept-{}>"


def text_spec(model: DiffusionModel | Encoder) -> TextSpec:
    """What the engine's prompt reader must know of a text encoder; of a model's, the first."""
    encoder = model.encoders[0] if isinstance(model, DiffusionModel) else model
    vocab_size, dim = encoder.token_embedding.shape
    tokenizer: Any = encoder.tokenizer  # annotated for lists of tokens as well
    return TextSpec(
        max_tokens=encoder.max_tokens,
        dim=dim,
        output_dim=int(encoder.text_encoder.config.hidden_size),
        vocab_size=vocab_size,
        bos_token_id=encoder.bos_token_id,
        eos_token_id=encoder.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        embedding_fingerprint=embedding_fingerprint(encoder.token_embedding.cpu().numpy()),
    )


def plain_tokenizer(model: DiffusionModel | Encoder) -> Tokenizer:
    """A copy of the fast tokenizer that neither pads nor truncates, as the reader wants it.

    Of a model's tokenizers the first.

    A `tokenizer.json` may store a padding length, which would then count as text.
    """
    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def as_concept(
    model: DiffusionModel,
    vectors: Float32[Tensor, "num_vectors all_dims"],
    *,
    placeholder_token: str,
    metadata: Mapping[str, str] | None = None,
) -> Concept:
    """Learned vectors, those for each text encoder side by side, as a concept of this model."""
    first, *second = (part.cpu().numpy() for part in vectors.split(model.dims, dim=1))
    return Concept(
        placeholder_token=placeholder_token,
        learned_embeddings=np.ascontiguousarray(first),
        learned_embeddings_2=np.ascontiguousarray(second[0]) if second else None,
        embedding_fingerprint=text_spec(model).embedding_fingerprint,
        metadata=metadata or {},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePrompts:
    """Templates as inputs of one encoder: fixed rows of the vocabulary, and where the vectors go.

    `second` holds the same templates for a second text encoder.
    """

    frozen_embeds: Float32[Tensor, "templates tokens dim"]
    slots: Int64[Tensor, "templates num_vectors"]  # positions of the vectors, word by word
    eos_index: Int64[Tensor, " templates"]
    second: "TemplatePrompts | None" = None

    @property
    def of_encoders(self) -> tuple["TemplatePrompts", ...]:
        """The layouts for each text encoder in turn."""
        return (self,) if self.second is None else (self, self.second)

    @classmethod
    def lay_out(cls, model: DiffusionModel, templates: Sequence[str], *num_vectors: int) -> Self:
        """Lay out each template once for each text encoder.

        `num_vectors` of each new word, in the order in which `str.format` numbers them.
        Raises `LearningError` if the vectors do not fit into a concept, or beside a template's
        words into an encoder.
        """
        first, *second = (
            cls._lay_out(model, index, templates, num_vectors)
            for index in range(len(model.encoders))
        )
        return replace(first, second=second[0] if second else None)

    @classmethod
    def _lay_out(
        cls,
        model: DiffusionModel,
        index: int,
        templates: Sequence[str],
        num_vectors: Sequence[int],
    ) -> Self:
        encoder = model.encoders[index]
        table, text = encoder.token_embedding.cpu().numpy(), text_spec(encoder)
        reader = PromptReader(plain_tokenizer(encoder), table, text, encoder=index)
        # Before the stand-ins are made: neither a concept nor a chunk can hold just any number.
        _check_room(
            reader, text, _stand_ins(model.dims, [1] * len(num_vectors)), templates, num_vectors
        )
        words = _stand_ins(model.dims, num_vectors)
        inputs = [_read(reader, template, words) for template in templates]
        return cls(
            frozen_embeds=torch.from_numpy(np.concatenate([i.inputs_embeds for i in inputs])),
            slots=torch.tensor(
                [_positions(i, words, t) for i, t in zip(inputs, templates, strict=True)]
            ),
            eos_index=torch.from_numpy(np.concatenate([i.eos_index for i in inputs])),
        )

    def __len__(self) -> int:
        return len(self.frozen_embeds)

    def splice(
        self, vectors: Float32[Tensor, "*rows num_vectors dim"], which: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch tokens dim"]:
        """The chosen templates with `vectors` in their slots; differentiable in `vectors` alone.

        The same vectors for all, or those of each row of the batch.
        """
        rows = torch.arange(len(which), device=which.device)[:, None].expand_as(self.slots[which])
        values = vectors.expand(len(which), *vectors.shape[-2:])
        return self.frozen_embeds[which].index_put((rows, self.slots[which]), values)

    def to(self, device: torch.device) -> Self:
        return type(self)(
            frozen_embeds=self.frozen_embeds.to(device),
            slots=self.slots.to(device),
            eos_index=self.eos_index.to(device),
            second=self.second.to(device) if self.second is not None else None,
        )


def _stand_ins(dims: Sequence[int], num_vectors: Sequence[int]) -> list[Concept]:
    """A concept for each word, of as many vectors as it has."""
    words: list[Concept] = []
    for place, count in enumerate(num_vectors):
        first, *second = (np.zeros((count, dim), np.float32) for dim in dims)
        words.append(
            Concept(
                placeholder_token=_STAND_IN.format(place),
                learned_embeddings=first,
                learned_embeddings_2=second[0] if second else None,
            )
        )
    return words


def _read(reader: PromptReader, template: str, words: Sequence[Concept]) -> EncoderInput:
    return reader.read(template.format(*(word.placeholder_token for word in words)), words)


def _positions(encoder_input: EncoderInput, words: Sequence[Concept], template: str) -> list[int]:
    """Where the vectors of the words stand, word by word."""
    if len(encoder_input.slots) != len(words):
        raise LearningError(
            f"the template {template!r} must name each new word once; a backslash before a word "
            "makes it plain text"
        )
    starts = {token: at for _, at, token in encoder_input.slots}
    return [
        starts[word.placeholder_token] + place
        for word in words
        for place in range(word.num_vectors)
    ]


def _check_room(
    reader: PromptReader,
    text: TextSpec,
    single_vectors: Sequence[Concept],
    templates: Sequence[str],
    num_vectors: Sequence[int],
) -> None:
    """Refuse more vectors than a concept holds, or than the longest template leaves room for."""
    places, count = text.max_tokens - 2, len(num_vectors)
    words, longest = max(
        (_read(reader, template, single_vectors).report.num_tokens - count, template)
        for template in templates
    )
    if words + count > places:
        raise LearningError(
            f"the template {longest!r} leaves no room for a new word: the text encoder has "
            f"{places} places, the words need {words}; use a model with a longer text encoder"
        )
    limit = min(places - words, count * MAX_NUM_VECTORS)
    if sum(num_vectors) > limit:
        raise LearningError(
            f"num_vectors={' + '.join(map(str, num_vectors))} is too many beside the template "
            f"{longest!r}: the text encoder has {places} places, the words need {words}; a concept "
            f"has up to {MAX_NUM_VECTORS} vectors; use num_vectors of at most {limit}"
            f"{' together' if count > 1 else ''}"
        )
