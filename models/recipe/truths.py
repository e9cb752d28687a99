"""Sentences about composed pictures, and which of them are true: exactly, since all is composed.

A sentence may be true, false or unknown: an apple as its set draws it may or may not be "a red
apple". Unknown pairs teach nothing and count for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int8

from models.recipe.compositions import Composition, Shown
from models.recipe.objects import COLOURS, OBJECT_COLOURS, plural, with_article
from models.recipe.scenes import SCENES

TRUE, FALSE, UNKNOWN = 1, 0, -1
PATTERNS = ("striped", "checkered", "dotted")
BACKGROUNDS = (*COLOURS, *PATTERNS, *SCENES)
_COUNTS = {1: "one", 2: "two", 3: "three"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """What a sentence claims of one noun; None: it does not say."""

    noun: str
    colour: str | None = None
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A sentence and its claims."""

    sentence: str
    things: tuple[Thing, ...] = ()
    style: str | None = None
    background: str | None = None  # a name of `BACKGROUNDS`; a colour means a plain background
    says_more: bool = False  # than is listed: where the listed claims hold, the rest is unknown


def truth_matrix(
    queries: Sequence[Query], compositions: Sequence[Composition]
) -> Int8[np.ndarray, "pictures queries"]:
    """TRUE, FALSE or UNKNOWN for each sentence of each picture."""
    rows = [_row(queries, composition) for composition in compositions]
    return np.array(rows, dtype=np.int8).reshape(len(compositions), len(queries))


def _row(queries: Sequence[Query], composition: Composition) -> list[int]:
    by_noun = {shown.noun: shown for shown in composition.shown}
    style = composition.shown[0].style
    row: list[int] = []
    for query in queries:
        if (query.background or composition.background) != composition.background:
            row.append(FALSE)
        elif (query.style or style) != style:
            row.append(FALSE)
        else:
            row.append(_truth_of_things(query, by_noun))
    return row


def _truth_of_things(query: Query, by_noun: dict[str, Shown]) -> int:
    truths = [_truth_of_thing(thing, by_noun.get(thing.noun)) for thing in query.things]
    if FALSE in truths:
        return FALSE
    return UNKNOWN if query.says_more or UNKNOWN in truths else TRUE


def _truth_of_thing(thing: Thing, shown: Shown | None) -> int:
    """A number is claimed exactly; without one, one or more will do."""
    if shown is None or thing.count not in (None, shown.count):
        return FALSE
    if thing.colour in (None, shown.colour):
        return TRUE
    return UNKNOWN if shown.colour is None else FALSE


def noun_query(noun: str) -> Query:
    """ "a fox": what asks for an object."""
    return Query(sentence=with_article(noun), things=(Thing(noun=noun),))


def style_query(style: str) -> Query:
    """ "in twemoji style": what asks for a style."""
    return Query(sentence=f"in {style} style", style=style)


def background_query(name: str) -> Query:
    """ "on a blue background", "in the forest": what asks for a background of `BACKGROUNDS`."""
    phrase = SCENES[name][1][0] if name in SCENES else f"on a {name} background"
    return Query(sentence=phrase, background=name)


def rephrased(query: Query, rng: np.random.Generator) -> Query:
    """One of the three queries above, its sentence in other words at random."""
    sentence = query.sentence
    if query.things:
        bare = query.things[0].noun
        sentences = (
            sentence,
            f"the {bare}",
            bare,
            f"a photo of {sentence}",
            f"a picture of {sentence}",
        )
    elif query.style:
        sentences = (
            sentence,
            f"in the style of {query.style}",
            f"a picture in {query.style} style",
        )
    elif query.background in SCENES:
        sentences = SCENES[query.background][1]
    else:
        name = query.background
        sentences = (sentence, f"a {name} background", f"a picture on a {name} background")
        if name in COLOURS:
            sentences += (f"on {name}", f"in front of a {name} wall")
    return replace(query, sentence=str(rng.choice(sentences)))


def partial_query(composition: Composition, rng: np.random.Generator) -> Query:
    """A true sentence that says some of what is known of a picture."""
    by_noun = {shown.noun: shown for shown in composition.shown}
    nouns = list(by_noun)
    if len(nouns) > 1 and rng.random() < 0.4:
        nouns = [str(rng.choice(nouns))]
    things = tuple(_partial_thing(by_noun[noun], rng) for noun in rng.permutation(nouns))
    return told(
        things,
        style=composition.shown[0].style if rng.random() < 0.35 else None,
        background=composition.background if rng.random() < 0.5 else None,
    )


def _partial_thing(shown: Shown, rng: np.random.Generator) -> Thing:
    return Thing(
        noun=shown.noun,
        colour=shown.colour if rng.random() < 0.7 else None,
        count=shown.count if shown.count > 1 or rng.random() < 0.1 else None,
    )


def altered_query(
    composition: Composition, nouns: Sequence[str], styles: Sequence[str], rng: np.random.Generator
) -> Query:
    """What `partial_query` says of a picture, one claim put wrong: the hard negatives."""
    query = partial_query(composition, rng)
    things, first = list(query.things), query.things[0]
    kind = rng.random()
    if query.style and kind < 0.3:
        return told(query.things, style=str(rng.choice(styles)), background=query.background)
    if query.background and kind < 0.5:
        return told(query.things, style=query.style, background=str(rng.choice(BACKGROUNDS)))
    if kind < 0.65:
        things[0] = replace(first, colour=str(rng.choice(OBJECT_COLOURS)))
    elif kind < 0.75:
        things[0] = replace(first, count=int(rng.choice(list(_COUNTS))))
    else:
        things[0] = replace(first, noun=str(rng.choice(nouns)))
    return told(tuple(things), style=query.style, background=query.background)


def caption_query(composition: Composition) -> Query:
    """The whole caption, which may say more than the facts: where things stand, two colours."""
    caption, by_noun = composition.caption, {shown.noun: shown for shown in composition.shown}
    style = composition.shown[0].style
    styled = caption.endswith((f"in {style} style", f"in the style of {style}"))
    # Half of the captions of white backgrounds do not say so.
    silent = composition.background == "white" and not any(
        phrase in caption for phrase in ("on a white background", "on white", "a white wall")
    )
    return Query(
        sentence=caption,
        things=tuple(
            Thing(noun=s.noun, colour=s.colour, count=s.count if s.count > 1 else None)
            for s in by_noun.values()
        ),
        style=style if styled else None,
        background=None if silent else composition.background,
        says_more=True,
    )


def told(things: tuple[Thing, ...], *, style: str | None, background: str | None) -> Query:
    """The query of these claims, in plain words."""
    subject = " and ".join(_phrase(thing) for thing in things)
    where = background_query(background).sentence if background else ""
    how = style_query(style).sentence if style else ""
    sentence = " ".join(f"{subject} {where} {how}".split())
    return Query(sentence=sentence, things=things, style=style, background=background)


def _phrase(thing: Thing) -> str:
    count = thing.count
    noun = thing.noun if count in (None, 1) else plural(thing.noun)
    words = f"{thing.colour} {noun}" if thing.colour else noun
    return with_article(words) if count is None else f"{_COUNTS[count]} {words}"
