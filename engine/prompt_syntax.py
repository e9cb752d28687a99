"""The syntax of prompts: text with placeholders, weights and escapes -> weighted pieces.

Placeholders are found first: longest match, on word boundaries. Then `(word)` weighs 1.1, `[word]`
1/1.1, `(word:1.3)` 1.3, nested ones multiply; a backslash takes a bracket literally; as in
AUTOMATIC1111's web UI.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from engine.concepts import Concept
from engine.errors import InvalidRequest, PromptTooLong, UnknownConcept

MAX_PROMPT_CHARACTERS = 20_000
MAX_WEIGHT = 10.0
MAX_NESTED_BRACKETS = 64
_BRACKET_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_OPENING = {")": "(", "]": "["}
# A backslash that is itself escaped escapes nothing: only pairs of them may stand before a match.
_UNESCAPED = r"(?<!\\)(?:\\\\)*+"
_PLACEHOLDER_LIKE = re.compile(rf"{_UNESCAPED}(?P<token><[^\s<>()\[\]:,\\]{{1,62}}>)")
# Every repetition inside the weight is bounded, else a failed match costs the square of its length;
# 20 digits are more than any float is printed with. ASCII: `float` refuses the dotless i of "ınf".
_SYNTAX = re.compile(
    r"""
      \\.                                     # an escaped character
    | [(\[]
    | :\s{0,8}
      (?P<weight>
        [+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20}|nan|inf)(?:e[+-]?\d{1,3})?
      )
      \s{0,8}\)
    | [)\]]
    | [^\\()\[\]:]+                           # plain text
    | :
    | \\                                      # at the very end
    """,
    re.DOTALL | re.IGNORECASE | re.ASCII | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt with one weight: plain text, or one concept."""

    text: str
    weight: float
    origins: tuple[int, ...]  # where each character of `text` stands in the prompt
    concept: Concept | None = None


def find_placeholders(text: str, placeholder_tokens: Sequence[str]) -> list[tuple[int, int, str]]:
    """Spans (start, end, token) of the placeholders in a text, longest match first.

    A token that begins or ends with a letter, digit or underscore matches whole words only, so that
    `cat` is not found in `cats`. A token behind a backslash is plain text,
    one behind an escaped backslash (two of them) is not.
    """
    if not placeholder_tokens:
        return []
    alternatives = sorted(set(placeholder_tokens), key=lambda token: (-len(token), token))
    pattern = "|".join(_bounded(token) for token in alternatives)
    found = re.finditer(rf"{_UNESCAPED}(?P<token>{pattern})", text)
    return [(*match.span("token"), match["token"]) for match in found]


def _bounded(token: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.search(r"\w$", token) else ""
    return f"{before}{re.escape(token)}{after}"


def named_placeholders(prompt: str) -> list[str]:
    """Everything in a prompt written like a placeholder, `<word>`, in order of first use."""
    return list(dict.fromkeys(match["token"] for match in _PLACEHOLDER_LIKE.finditer(prompt)))


def parse_prompt(
    prompt: str, concepts: Mapping[str, Concept], *, field: str = "prompt"
) -> list[Piece]:
    """Split a prompt into weighted pieces of text and concepts.

    Raises, with `field` as the name of the prompt: `UnknownConcept` for a `<word>` that is none of
    `concepts`, `InvalidRequest` for weights that are not, or do not multiply to, numbers between
    -10 and 10 and for brackets nested too deeply, `PromptTooLong` for text that no one wrote.
    """
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise PromptTooLong(
            f"{field} has {len(prompt)} characters, the limit is {MAX_PROMPT_CHARACTERS}; "
            "shorten it",
            field=field,
        )
    _refuse_unknown(prompt, concepts, field)
    brackets = _Brackets(field)
    runs = list(_runs(prompt, concepts, brackets))
    return [_checked(piece, field) for piece in _merge(runs, brackets.weights())]


def _refuse_unknown(prompt: str, concepts: Mapping[str, Concept], field: str) -> None:
    for token in named_placeholders(prompt):
        if token not in concepts:
            known = ", ".join(sorted(concepts)[:10]) or "none"
            raise UnknownConcept(
                f"unknown concept {token!r} in {field}; known to this request: {known}; import it, "
                f"send it along, or write \\{token} if it is plain text",
                placeholder_token=token,
            )


class _Brackets:
    """The brackets of one prompt, as a tree in which parents come before children.

    Number 0 is the prompt itself. A bracket has its factor from the start, so that one that is
    never closed reaches the end, as in A1111's `parse_prompt_attention`.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._kinds = [""]
        self._factors = [1.0]
        self._parents = [0]
        self._open = [0]

    @property
    def innermost(self) -> int:
        return self._open[-1]

    def read(self, match: re.Match[str]) -> bool:
        """Follow one match of `_SYNTAX`; False where it is no bracket but text."""
        text, weight = match.group(), match["weight"]
        if text in _BRACKET_FACTORS:
            self._enter(text, match.start())
            return True
        if self._kinds[self.innermost] != ("(" if weight else _OPENING.get(text)):
            return False
        if weight:
            self._factors[self.innermost] = _weight(weight, self._field)
        self._open.pop()
        return True

    def _enter(self, kind: str, position: int) -> None:
        if len(self._open) > MAX_NESTED_BRACKETS:
            raise InvalidRequest(
                f"{self._field} has {len(self._open)} nested brackets at character {position}, the "
                f"limit is {MAX_NESTED_BRACKETS}; close some, or write \\{kind} for a literal one",
                field=self._field,
            )
        self._parents.append(self.innermost)
        self._open.append(len(self._kinds))
        self._kinds.append(kind)
        self._factors.append(_BRACKET_FACTORS[kind])

    def weights(self) -> list[float]:
        """Of each bracket: its factor times those of all brackets around it."""
        weights = [1.0]
        for factor, parent in zip(self._factors[1:], self._parents[1:], strict=True):
            weights.append(weights[parent] * factor)
        return weights


def _weight(text: str, field: str) -> float:
    weight = float(text)
    if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
        raise InvalidRequest(
            f"weight in {field} must be between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g}, got {text}; "
            "most images want 0.5 to 1.5",
            field=field,
        )
    return weight


@dataclass(frozen=True, slots=True)
class _Run:
    """Text between two marks of syntax, or a concept, with the number of the bracket around it."""

    text: str
    origins: Sequence[int]
    bracket: int
    concept: Concept | None = None


def _runs(prompt: str, concepts: Mapping[str, Concept], brackets: _Brackets) -> Iterator[_Run]:
    position = 0
    for start, end, token in find_placeholders(prompt, list(concepts)):
        yield from _text_runs(prompt, position, start, brackets)
        yield _Run(token, range(start, end), brackets.innermost, concepts[token])
        position = end
    yield from _text_runs(prompt, position, len(prompt), brackets)


def _text_runs(prompt: str, start: int, end: int, brackets: _Brackets) -> Iterator[_Run]:
    for match in _SYNTAX.finditer(prompt, start, end):
        text, position = match.group(), match.start()
        if len(text) == 2 and text[0] == "\\":
            yield _Run(text[1], (position,), brackets.innermost)
        elif not brackets.read(match):
            yield _Run(text, range(position, match.end()), brackets.innermost)


def _merge(runs: Sequence[_Run], weights: Sequence[float]) -> Iterator[Piece]:
    """Join neighbouring text of one weight, so that brackets do not change how words are cut."""

    def weight_and_place(run: _Run) -> tuple[float, int]:
        return weights[run.bracket], run.origins[0] if run.concept else -1

    for (weight, _), group in groupby(runs, key=weight_and_place):
        joined = list(group)
        origins = tuple(chain.from_iterable(run.origins for run in joined))
        yield Piece("".join(run.text for run in joined), weight, origins, joined[0].concept)


def _checked(piece: Piece, field: str) -> Piece:
    if not -MAX_WEIGHT <= piece.weight <= MAX_WEIGHT:
        raise InvalidRequest(
            f"nested weights in {field} multiply to {piece.weight:.3g} at {piece.text[:40]!r}, "
            f"they must stay between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g}; take some brackets away, "
            "or write \\( and \\[ for literal ones",
            field=field,
        )
    return piece
