"""Prompts: text with placeholders and weights -> token embeddings in chunks for the encoder.

The tokenizer is never touched. Concepts (engine/prompt_syntax.py finds them) take `num_vectors`
slots each; the rest is tokenized as always; embeddings are looked up here on the host and the
concepts' vectors laid into their slots. The trainer splices with the same code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64
from tokenizers import Tokenizer

from engine.bundle import TextSpec
from engine.concepts import Concept
from engine.errors import InvalidRequest
from engine.prompt_syntax import Piece, parse_prompt

MAX_CHUNKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What became of a prompt; nothing is ignored in silence."""

    matched: tuple[Concept, ...]  # concepts found in the prompt, in order of first use
    num_tokens: int  # tokens and concept vectors, without BOS, EOS and padding
    num_chunks: int
    cut: str  # the end of the prompt, as it was written, that had no room; "" when all was used


NOTHING_READ = PromptReport(matched=(), num_tokens=0, num_chunks=1, cut="")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderInput:
    """One prompt, ready for the text encoder: one row per chunk."""

    input_ids: Int64[np.ndarray, "chunks tokens"]  # slots of concepts hold the EOS id
    inputs_embeds: Float32[np.ndarray, "chunks tokens dim"]
    eos_index: Int64[np.ndarray, " chunks"]  # where pooling looks, whatever fills the slots
    weights: Float32[np.ndarray, "chunks tokens"]
    slots: tuple[tuple[int, int, str], ...]  # (chunk, first position, placeholder token)
    report: PromptReport


@dataclass(slots=True)
class _Slot:
    """One unit that is not divided between chunks: a token, or all vectors of a concept."""

    token_id: int
    weight: float
    start: int  # in the prompt
    concept: Concept | None = None

    @property
    def length(self) -> int:
        return self.concept.num_vectors if self.concept else 1


class PromptReader:
    """Turns prompts into encoder inputs for one text encoder of a model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        token_embedding: Float[np.ndarray, "vocab_size dim"],
        text: TextSpec,
        *,
        max_chunks: int = MAX_CHUNKS,
        encoder: int = 0,  # which of a concept's vectors are for this text encoder
    ) -> None:
        self._tokenizer = tokenizer
        self._token_embedding = token_embedding
        self._text = text
        self._max_chunks = max_chunks
        self._encoder = encoder

    def read(
        self, prompt: str, concepts: Sequence[Concept] = (), *, field: str = "prompt"
    ) -> EncoderInput:
        """Tokenize a prompt, cut it into chunks and splice the concepts in.

        Errors are those of `parse_prompt`; they call the prompt by the name of its `field`.
        """
        pieces = parse_prompt(prompt, _by_token(concepts), field=field)
        chunks, cut = self._fill_chunks(self._slots(pieces))
        matched = {p.concept.placeholder_token: p.concept for p in pieces if p.concept}
        report = PromptReport(
            matched=tuple(matched.values()),
            num_tokens=sum(slot.length for chunk in chunks for slot in chunk),
            num_chunks=len(chunks),
            cut=prompt[cut.start :] if cut else "",
        )
        return self._lay_out(chunks, report)

    def pad(self, encoder_input: EncoderInput, num_chunks: int) -> EncoderInput:
        """Append empty chunks, so that all rows of an image have the same context length."""
        missing = num_chunks - len(encoder_input.eos_index)
        if missing <= 0:
            return encoder_input
        padding = self._lay_out([[]] * missing, encoder_input.report)
        return EncoderInput(
            input_ids=np.concatenate([encoder_input.input_ids, padding.input_ids]),
            inputs_embeds=np.concatenate([encoder_input.inputs_embeds, padding.inputs_embeds]),
            eos_index=np.concatenate([encoder_input.eos_index, padding.eos_index]),
            weights=np.concatenate([encoder_input.weights, padding.weights]),
            slots=encoder_input.slots,
            report=encoder_input.report,
        )

    def _slots(self, pieces: Sequence[Piece]) -> list[_Slot]:
        slots: list[_Slot] = []
        for piece in pieces:
            if piece.concept is not None:
                token_id, start = self._text.eos_token_id, piece.origins[0]
                slots.append(_Slot(token_id, piece.weight, start, piece.concept))
                continue
            encoding = self._tokenizer.encode(piece.text, add_special_tokens=False)
            for token_id, (at, _) in zip(encoding.ids, encoding.offsets, strict=True):
                # Byte-level tokenizers trim blanks: a last token of them starts behind the text.
                start = piece.origins[min(at, len(piece.origins) - 1)]
                slots.append(_Slot(token_id, piece.weight, start))
        return slots

    def _fill_chunks(self, slots: Sequence[_Slot]) -> tuple[list[list[_Slot]], _Slot | None]:
        """Greedy filling: the chunks, and the first slot that had no room.

        A concept that does not fit into the rest of a chunk opens the next.
        """
        room = self._text.max_tokens - 2
        chunks: list[list[_Slot]] = [[]]
        used = 0
        for slot in slots:
            if used + slot.length > room:
                if len(chunks) == self._max_chunks:
                    return chunks, slot
                chunks.append([])
                used = 0
            chunks[-1].append(slot)
            used += slot.length
        return chunks, None

    def _lay_out(self, chunks: Sequence[Sequence[_Slot]], report: PromptReport) -> EncoderInput:
        text = self._text
        shape = (len(chunks), text.max_tokens)
        input_ids = np.full(shape, text.pad_token_id, np.int64)
        weights = np.ones(shape, np.float32)
        eos_index = np.zeros(len(chunks), np.int64)
        placed: list[tuple[int, int, Concept]] = []
        for row, chunk in enumerate(chunks):
            input_ids[row, 0] = text.bos_token_id
            position = 1
            for slot in chunk:
                input_ids[row, position : position + slot.length] = slot.token_id
                weights[row, position : position + slot.length] = slot.weight
                if slot.concept:
                    placed.append((row, position, slot.concept))
                position += slot.length
            # CLIP pads with EOS in Stable Diffusion 1.x, so only the first EOS is the end.
            input_ids[row, position] = text.eos_token_id
            eos_index[row] = position
        # Rows of a float16 table are widened, which is exact; a concept's vectors stay float32.
        inputs_embeds = self._token_embedding[input_ids].astype(np.float32, copy=False)
        for row, position, concept in placed:
            vectors = concept.encoders[self._encoder]
            inputs_embeds[row, position : position + len(vectors)] = vectors
        return EncoderInput(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            eos_index=eos_index,
            weights=weights,
            slots=tuple((row, at, concept.placeholder_token) for row, at, concept in placed),
            report=report,
        )


def _by_token(concepts: Sequence[Concept]) -> dict[str, Concept]:
    by_token: dict[str, Concept] = {}
    for concept in concepts:
        other = by_token.setdefault(concept.placeholder_token, concept)
        if other.concept_id != concept.concept_id:
            raise InvalidRequest(
                f"two different concepts of this request are called {concept.placeholder_token!r}; "
                "rename one of them",
                field="concepts",
            )
    return by_token


def apply_weights(
    prompt_embeds: Float32[np.ndarray, "chunks tokens dim"],
    weights: Float32[np.ndarray, "chunks tokens"],
) -> Float32[np.ndarray, "chunks tokens dim"]:
    """Weigh each token's output, then restore the mean, as AUTOMATIC1111's web UI does.

    The mean is restored chunk by chunk, so that a prompt does not depend on its batch.
    """
    if (weights == 1.0).all():
        return prompt_embeds
    weighted = prompt_embeds * weights[..., None]
    before = prompt_embeds.mean(axis=(1, 2), keepdims=True)
    after = weighted.mean(axis=(1, 2), keepdims=True)
    # A mean that vanishes cannot be restored by a factor; the weights alone must do then.
    factor = np.divide(before, after, out=np.ones_like(before), where=np.abs(after) > 1e-6)
    return weighted * factor
