"""The exam of a model: 200 fixed prompts, each with a real picture of the same facts, and marks.

Questions come from compositions that no training has seen: the composed picture is what a perfect
answer looks like, and what the evaluator makes of it is the ceiling of the marks.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from engine.requests import RgbImage
from models.recipe.compositions import Composer, Composition
from models.recipe.objects import COLOURS
from models.recipe.scenes import SCENES
from models.recipe.truths import Thing, background_query, noun_query, style_query, told
from trainer.evaluator import Evaluator, ImageEmbeds

_SMALLEST_SHARE = 0.5  # of the picture's side: a prompt does not say "small"
_SEARCHED = 40_000  # compositions, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A picture asked for, and what must be seen in it; None: anything will do."""

    prompt: str
    nouns: tuple[str, ...]
    style: str | None
    colour: str | None  # of a plain background
    picture: RgbImage  # composed, with just these facts


@dataclass(frozen=True, slots=True)
class Share:
    """How many of how many."""

    hits: int
    asked: int

    def __str__(self) -> str:
        if not self.asked:
            return "none asked"
        return f"{100 * self.hits / self.asked:.1f} % of {self.asked}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A sort of question: how many, about which compositions, and what the prompt says."""

    wanted: int
    num_nouns: int = 1
    background_kind: str = "plain"
    styled: bool = False
    placed: bool = True

    def fits(self, composition: Composition) -> bool:
        kind = composition.background_kind
        return len(_nouns(composition)) == self.num_nouns and kind == self.background_kind


_KINDS = (
    _Kind(wanted=50),
    _Kind(wanted=50, styled=True),
    _Kind(wanted=50, num_nouns=2),
    _Kind(wanted=30, styled=True, placed=False),
    _Kind(wanted=20, background_kind="scene"),
)


@dataclass(slots=True)
class _Pile:
    """The questions of one kind, as they are found."""

    kind: _Kind
    questions: list[Question] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)

    @property
    def full(self) -> bool:
        return len(self.questions) == self.kind.wanted

    def takes(self, composition: Composition, num_nouns: int) -> bool:
        """Takes what fits, unless a noun or the background has had twice its share."""
        kind, used = self.kind, self.uses
        num_backgrounds = len(SCENES if kind.background_kind == "scene" else COLOURS)
        most_nouns = math.ceil(2 * kind.wanted * kind.num_nouns / num_nouns)
        most_backgrounds = math.ceil(2 * kind.wanted / num_backgrounds)
        if (
            self.full
            or not kind.fits(composition)
            or used[composition.background] >= most_backgrounds
            or any(used[noun] >= most_nouns for noun in _nouns(composition))
        ):
            return False
        self.questions.append(_question(composition, kind))
        used.update((*_nouns(composition), composition.background))
        return True


def exam_questions(composer: Composer, first_index: int) -> list[Question]:
    """200 questions about a composer's objects: the same for the same objects and size.

    The first compositions from `first_index` on that fit, none asked much more than its share.
    """
    piles = [_Pile(kind) for kind in _KINDS]
    for index in range(first_index, first_index + _SEARCHED):
        composition = composer.compose(index)
        if _natural(composition):
            any(
                pile.takes(composition, len(composer.nouns)) for pile in piles
            )  # the first that does
        if all(pile.full for pile in piles):
            break
    return [question for pile in piles for question in pile.questions]


def question_of(composition: Composition) -> Question:
    """A composition as the question that its caption asks, with all that can be marked in it."""
    return Question(
        prompt=composition.caption,
        nouns=_nouns(composition),
        style=composition.shown[0].style,
        colour=composition.background if _plain(composition) else None,
        picture=composition.pixels,
    )


def _question(composition: Composition, kind: _Kind) -> Question:
    style = composition.shown[0].style if kind.styled else None
    where = composition.background if kind.placed else None
    things = tuple(Thing(noun=noun) for noun in _nouns(composition))
    return Question(
        prompt=told(things, style=style, background=where).sentence,
        nouns=_nouns(composition),
        style=style,
        colour=where if _plain(composition) else None,
        picture=composition.pixels,
    )


def _nouns(composition: Composition) -> tuple[str, ...]:
    return tuple(dict.fromkeys(shown.noun for shown in composition.shown))


def _plain(composition: Composition) -> bool:
    return composition.background_kind == "plain"


def _natural(composition: Composition) -> bool:
    """Whether things look as a prompt without adjectives or numbers would have them."""
    side = composition.pixels.shape[0]
    return all(
        shown.colour is None
        and shown.count == 1
        and (len(composition.shown) > 1 or shown.box[2] >= _SMALLEST_SHARE * side)
        for shown in composition.shown
    )


class Examiner:
    """Marks pictures with the evaluator: each choice is among all that it was taught."""

    def __init__(self, evaluator: Evaluator) -> None:
        spec = evaluator.spec
        self.evaluator = evaluator
        self.nouns, self.styles, self.colours = spec.nouns, spec.styles, spec.colours
        self._nouns = evaluator.text_embeds([noun_query(n).sentence for n in spec.nouns])
        self._styles = evaluator.text_embeds([style_query(s).sentence for s in spec.styles])
        self._colours = evaluator.text_embeds([background_query(c).sentence for c in spec.colours])

    def noun_logits(self, embeds: ImageEmbeds) -> Float32[np.ndarray, "images nouns"]:
        """The log-odds of each noun, in the order of `nouns`."""
        return self.evaluator.logits(embeds, self._nouns)

    def colours_found(self, embeds: ImageEmbeds) -> list[str]:
        """The colour of each picture's background, as if all were plain."""
        best = self.evaluator.logits(embeds, self._colours).argmax(axis=1)
        return [self.colours[place] for place in best]

    def styles_found(self, embeds: ImageEmbeds) -> list[str]:
        """The style of each picture."""
        best = self.evaluator.logits(embeds, self._styles).argmax(axis=1)
        return [self.styles[place] for place in best]

    def marks(
        self, pictures: Sequence[UInt8[np.ndarray, "h w 3"]], questions: Sequence[Question]
    ) -> dict[str, Share]:
        """Of the pictures that were asked for it, how many show the object first among all nouns,
        both objects as the first two, the style, and the background's colour."""
        embeds = self.evaluator.image_embeds(pictures)
        ranked = np.argsort(-self.noun_logits(embeds), axis=1)
        found = [
            {self.nouns[place] for place in row[: len(question.nouns)]}
            for row, question in zip(ranked, questions, strict=True)
        ]
        seen = np.array([set(q.nouns) == f for q, f in zip(questions, found, strict=True)])
        styles, colours = self.styles_found(embeds), self.colours_found(embeds)
        styled = np.array([q.style == s for q, s in zip(questions, styles, strict=True)])
        coloured = np.array([q.colour == c for q, c in zip(questions, colours, strict=True)])
        return {
            "object": _share(seen, [len(q.nouns) == 1 for q in questions]),
            "both objects": _share(seen, [len(q.nouns) == 2 for q in questions]),
            "style": _share(styled, [q.style is not None for q in questions]),
            "background colour": _share(coloured, [q.colour is not None for q in questions]),
        }


def _share(hits: Bool[np.ndarray, " images"], asked: list[bool]) -> Share:
    return Share(int((hits & np.array(asked, dtype=bool)).sum()), sum(asked))
