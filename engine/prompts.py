"""Prompts: text with placeholders and weights -> token embeddings in chunks for the encoder.

The tokenizer is never touched. Placeholders are found first (longest match, on word boundaries) and
take `num_vectors` slots each; the rest is tokenized as always; embeddings are looked up here on the
host and the concepts' vectors laid into their slots. The trainer splices with the same code.

Syntax: `(word)` weighs 1.1, `[word]` 1/1.1, `(word:1.3)` 1.3, nested ones multiply; a backslash
takes a bracket literally; as in AUTOMATIC1111's web UI.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64
from tokenizers import Tokenizer

from engine.bundle import TextSpec
from engine.concepts import Concept
from engine.errors import InvalidRequest, PromptTooLong, UnknownConcept

MAX_PROMPT_CHARACTERS = 20_000
MAX_CHUNKS = 8
MAX_WEIGHT = 10.0
_BRACKET_FACTOR = 1.1
_PLACEHOLDER_LIKE = re.compile(r"(?<!\\)<[^\s<>()\[\]:,\\]{1,62}>")
_SYNTAX = re.compile(
    r"\\.|\(|\[|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+|nan|inf)(?:e[+-]?\d+)?)\s*\)|\)|\]|[^\\()\[\]:]+|:|\\",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt with one weight: plain text, or one concept."""

    text: str
    weight: float
    concept: Concept | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What became of a prompt; nothing is ignored in silence."""

    matched: tuple[Concept, ...]  # concepts found in the prompt, in order of first use
    num_tokens: int  # tokens and concept vectors, without BOS, EOS and padding
    num_chunks: int
    cut: str  # the text that had no room, "" when all was used


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderInput:
    """One prompt, ready for the text encoder: one row per chunk."""

    input_ids: Int64[np.ndarray, "chunks tokens"]  # slots of concepts hold the EOS id
    inputs_embeds: Float32[np.ndarray, "chunks tokens dim"]
    eos_index: Int64[np.ndarray, " chunks"]  # where pooling looks, whatever fills the slots
    weights: Float32[np.ndarray, "chunks tokens"]
    slots: tuple[tuple[int, int, str], ...]  # (chunk, first position, placeholder token)
    report: PromptReport


def find_placeholders(text: str, placeholder_tokens: Sequence[str]) -> list[tuple[int, int, str]]:
    """Spans (start, end, token) of the placeholders in a text, longest match first.

    A token that begins or ends with a letter, digit or underscore matches whole words only, so that
    `cat` is not found in `cats`. A token behind a backslash is plain text.
    """
    if not placeholder_tokens:
        return []
    alternatives = sorted(set(placeholder_tokens), key=lambda token: (-len(token), token))
    pattern = "|".join(_bounded(token) for token in alternatives)
    return [(m.start(), m.end(), m.group()) for m in re.finditer(rf"(?<!\\)(?:{pattern})", text)]


def _bounded(token: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.search(r"\w$", token) else ""
    return f"{before}{re.escape(token)}{after}"


def named_placeholders(prompt: str) -> list[str]:
    """Everything in a prompt written like a placeholder, `<word>`, in order of first use."""
    return list(dict.fromkeys(match.group() for match in _PLACEHOLDER_LIKE.finditer(prompt)))


def parse_prompt(prompt: str, concepts: Mapping[str, Concept]) -> list[Piece]:
    """Split a prompt into weighted pieces of text and concepts.

    Raises `UnknownConcept` for a `<word>` that is none of `concepts`, `InvalidRequest` for weights
    that are not finite numbers between -10 and 10, `PromptTooLong` for text that no one wrote.
    """
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise PromptTooLong(
            f"prompt has {len(prompt)} characters, the limit is {MAX_PROMPT_CHARACTERS}",
            field="prompt",
        )
    _refuse_unknown(prompt, concepts)
    spans = find_placeholders(prompt, list(concepts))
    return _merge(_weighted(prompt, spans, concepts))


def _refuse_unknown(prompt: str, concepts: Mapping[str, Concept]) -> None:
    for token in named_placeholders(prompt):
        if token not in concepts:
            known = ", ".join(sorted(concepts)[:10]) or "none"
            raise UnknownConcept(
                f"unknown concept {token!r}; known to this request: {known}; import it, send it "
                f"along, or write \\{token} if it is plain text",
                placeholder_token=token,
            )


def _weighted(
    prompt: str, spans: Sequence[tuple[int, int, str]], concepts: Mapping[str, Concept]
) -> list[Piece]:
    """A1111's `parse_prompt_attention`: brackets multiply the weight of all pieces inside them."""
    pieces: list[Piece] = []
    open_brackets: list[tuple[str, int]] = []
    for text, concept in _segments(prompt, spans, concepts):
        if concept is not None:
            pieces.append(Piece(text, 1.0, concept))
            continue
        for match in _SYNTAX.finditer(text):
            _consume(match, pieces, open_brackets)
    for bracket, start in reversed(open_brackets):  # never closed: A1111 lets it reach the end
        _scale(pieces, start, _BRACKET_FACTOR if bracket == "(" else 1 / _BRACKET_FACTOR)
    return pieces


def _segments(
    prompt: str, spans: Sequence[tuple[int, int, str]], concepts: Mapping[str, Concept]
) -> list[tuple[str, Concept | None]]:
    segments: list[tuple[str, Concept | None]] = []
    position = 0
    for start, end, token in spans:
        segments += [(prompt[position:start], None), (token, concepts[token])]
        position = end
    return [*segments, (prompt[position:], None)]


def _consume(
    match: re.Match[str], pieces: list[Piece], open_brackets: list[tuple[str, int]]
) -> None:
    text, weight = match.group(), match.group("weight")
    if text.startswith("\\") and len(text) > 1:
        pieces.append(Piece(text[1:], 1.0))
    elif text in "([":
        open_brackets.append((text, len(pieces)))
    elif weight is not None and _top(open_brackets) == "(":
        _scale(pieces, open_brackets.pop()[1], _checked_weight(weight))
    elif text == ")" and _top(open_brackets) == "(":
        _scale(pieces, open_brackets.pop()[1], _BRACKET_FACTOR)
    elif text == "]" and _top(open_brackets) == "[":
        _scale(pieces, open_brackets.pop()[1], 1 / _BRACKET_FACTOR)
    else:
        pieces.append(Piece(text, 1.0))


def _top(open_brackets: Sequence[tuple[str, int]]) -> str:
    return open_brackets[-1][0] if open_brackets else ""


def _scale(pieces: list[Piece], start: int, factor: float) -> None:
    pieces[start:] = [Piece(p.text, p.weight * factor, p.concept) for p in pieces[start:]]


def _checked_weight(text: str) -> float:
    weight = float(text)
    if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
        raise InvalidRequest(
            f"prompt weight must be between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g}, got {text}",
            field="prompt",
        )
    return weight


def _merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring text of one weight, so that brackets do not change how words are cut."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        joinable = last and last.concept is None and piece.concept is None
        if last and joinable and last.weight == piece.weight:
            merged[-1] = Piece(last.text + piece.text, piece.weight)
        elif piece.text:
            merged.append(piece)
    return merged


@dataclass(slots=True)
class _Slot:
    """One unit that is not divided between chunks: a token, or all vectors of a concept."""

    token_id: int
    weight: float
    text: str
    concept: Concept | None = None

    @property
    def length(self) -> int:
        return self.concept.num_vectors if self.concept else 1


class PromptReader:
    """Turns prompts into encoder inputs for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        token_embedding: Float32[np.ndarray, "vocab_size dim"],
        text: TextSpec,
        *,
        max_chunks: int = MAX_CHUNKS,
    ) -> None:
        self._tokenizer = tokenizer
        self._token_embedding = token_embedding
        self._text = text
        self._max_chunks = max_chunks

    def read(self, prompt: str, concepts: Sequence[Concept] = ()) -> EncoderInput:
        """Tokenize a prompt, cut it into chunks and splice the concepts in."""
        pieces = parse_prompt(prompt, _by_token(concepts))
        chunks, cut = self._fill_chunks(self._slots(pieces))
        matched = {p.concept.placeholder_token: p.concept for p in pieces if p.concept}
        report = PromptReport(
            matched=tuple(matched.values()),
            num_tokens=sum(slot.length for chunk in chunks for slot in chunk),
            num_chunks=len(chunks),
            cut="".join(slot.text for slot in cut),
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
                slots.append(
                    _Slot(self._text.eos_token_id, piece.weight, piece.text, piece.concept)
                )
                continue
            encoding = self._tokenizer.encode(piece.text, add_special_tokens=False)
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                slots.append(_Slot(token_id, piece.weight, piece.text[start:end]))
        return slots

    def _fill_chunks(self, slots: Sequence[_Slot]) -> tuple[list[list[_Slot]], list[_Slot]]:
        """Greedy filling; a concept that does not fit into the rest of a chunk opens the next."""
        room = self._text.max_tokens - 2
        chunks: list[list[_Slot]] = [[]]
        used = 0
        for position, slot in enumerate(slots):
            if used + slot.length > room:
                if len(chunks) == self._max_chunks:
                    return chunks, list(slots[position:])
                chunks.append([])
                used = 0
            chunks[-1].append(slot)
            used += slot.length
        return chunks, []

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
        inputs_embeds = self._token_embedding[input_ids]
        for row, position, concept in placed:
            inputs_embeds[row, position : position + concept.num_vectors] = (
                concept.learned_embeddings
            )
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
