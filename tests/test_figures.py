"""The figures of a model, on hand-made pictures: perfect ones have full marks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from engine.requests import RgbImage
from engine.sessions import Feeds
from models.recipe.accuracy import accuracy
from models.recipe.compositions import Composer
from models.recipe.errors import RecipeError
from models.recipe.exam import Examiner, Question, Share, exam_questions
from models.recipe.figures import Figures, chosen_parts, inversion_figures, page, psnr_db
from models.recipe.icons import Icon
from models.recipe.inversions import COLOUR_PROMPTS, NEUTRAL_PROMPTS, Inversion, Learned, judge
from models.recipe.objects import COLOURS
from models.recipe.truths import background_query, noun_query, style_query
from trainer.evaluator import Evaluator, EvaluatorSpec

NOUNS = ("apple", "car", "fox", "teddy bear")
STYLES = ("flat", "noto")
SIZE = 8
NOTHING = 255  # a level that stands for no sentence
# What can be true of a picture, one axis of the embeddings each.
TRUTHS = [
    *(noun_query(noun).sentence for noun in NOUNS),
    *(style_query(style).sentence for style in STYLES),
    *(background_query(colour).sentence for colour in COLOURS),
]


def _picture(*sentences: str) -> RgbImage:
    """A picture in which the fake evaluator sees what these sentences say, the first most."""
    picture = np.full((SIZE, SIZE, 3), NOTHING, np.uint8)
    for place, sentence in enumerate(sentences):
        picture[place, 0, 0] = TRUTHS.index(sentence)
    return picture


def _said(question: Question) -> list[str]:
    sentences = [noun_query(noun).sentence for noun in question.nouns]
    if question.style:
        sentences.append(style_query(question.style).sentence)
    if question.colour:
        sentences.append(background_query(question.colour).sentence)
    return sentences


class FakeImageEncoder:
    """Reads what `_picture` wrote."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        levels = np.rint(feeds["pixels"][:, 0, :, 0]).astype(int)
        embeds = np.zeros((len(levels), len(TRUTHS)), np.float32)
        for row, written in zip(embeds, levels, strict=True):
            for place, axis in enumerate(written[written < len(TRUTHS)]):
                row[axis] = 1 - 0.1 * place
        norms = np.linalg.norm(embeds, axis=1, keepdims=True)
        return {"image_embeds": embeds / np.maximum(norms, 1e-6)}


class FakeTextEncoder:
    """Each sentence of `TRUTHS` is an axis, any other nothing."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        axes = np.vstack([np.eye(len(TRUTHS)), np.zeros(len(TRUTHS))]).astype(np.float32)
        return {"text_embeds": axes[feeds["input_ids"][:, 0]]}


@pytest.fixture(scope="module")
def examiner() -> Examiner:
    vocabulary = {sentence: place for place, sentence in enumerate([*TRUTHS, "[UNK]"])}
    spec = EvaluatorSpec(
        image_size=SIZE,
        embed_dim=len(TRUTHS),
        max_tokens=1,
        pixel_mean=0.0,
        pixel_std=1 / 255,  # the fake encoder wants levels
        logit_scale=10.0,
        logit_bias=-5.0,
        nouns=NOUNS,
        held_out_nouns=("fox", "teddy bear"),
        styles=STYLES,
        colours=tuple(COLOURS),
    )
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return Examiner(Evaluator(spec, FakeImageEncoder(), FakeTextEncoder(), tokenizer))


@pytest.fixture(scope="module")
def composer() -> Composer:
    icons: list[Icon] = []
    for place, noun in enumerate(NOUNS):
        for style in STYLES:
            pixels = np.zeros((64, 64, 4), np.uint8)
            pixels[4:60, 4:60] = (50 * place, 90, 200, 255)
            icons.append(Icon(noun, noun, style, pixels))
    return Composer(icons, 32)


@pytest.fixture(scope="module")
def questions(composer: Composer) -> list[Question]:
    return exam_questions(composer, 0)


def test_there_are_200_questions_and_always_the_same(
    composer: Composer, questions: list[Question]
) -> None:
    assert len(questions) == 200
    again = exam_questions(composer, 0)
    assert [question.prompt for question in questions] == [question.prompt for question in again]
    for one, other in zip(questions, again, strict=True):
        np.testing.assert_array_equal(one.picture, other.picture)


def test_prompts_say_what_is_marked_and_no_more(questions: list[Question]) -> None:
    for question in questions:
        for sentence in _said(question):
            assert sentence in question.prompt
        assert (question.style is not None) == question.prompt.endswith(" style")
        assert (question.colour is not None) == ("background" in question.prompt)
    assert sum(len(question.nouns) == 2 for question in questions) == 50
    assert sum(question.style is not None for question in questions) == 80
    assert sum(question.colour is not None for question in questions) == 150


def test_no_background_is_asked_much_more_than_its_share(questions: list[Question]) -> None:
    colours = [question.colour for question in questions]
    # Half of composed plain backgrounds are white; of three kinds of 50, 7 each may be.
    assert max(colours.count(colour) for colour in COLOURS) <= 21


def test_perfect_pictures_have_full_marks(examiner: Examiner, questions: list[Question]) -> None:
    pictures = [_picture(*_said(question)) for question in questions]
    assert examiner.marks(pictures, questions) == {
        "object": Share(150, 150),
        "both objects": Share(50, 50),
        "style": Share(80, 80),
        "background colour": Share(150, 150),
    }


def test_pictures_of_something_else_have_none(
    examiner: Examiner, questions: list[Question]
) -> None:
    nouns: dict[str, str] = dict(zip(NOUNS, (*NOUNS[2:], *NOUNS[:2]), strict=True))
    styles: dict[str, str] = dict(zip(STYLES, STYLES[::-1], strict=True))
    colours = dict(zip(COLOURS, (*list(COLOURS)[1:], next(iter(COLOURS))), strict=True))
    singles = [question for question in questions if len(question.nouns) == 1]
    wrong = [
        replace(
            question,
            nouns=tuple(nouns[noun] for noun in question.nouns),
            style=question.style and styles[question.style],
            colour=question.colour and colours[question.colour],
        )
        for question in singles
    ]
    marks = examiner.marks([_picture(*_said(question)) for question in wrong], singles)
    assert [share.hits for share in marks.values()] == [0, 0, 0, 0]
    assert [share.asked for share in marks.values()] == [150, 0, 80, 100]


def test_one_of_two_objects_is_not_both(examiner: Examiner, questions: list[Question]) -> None:
    pairs = [question for question in questions if len(question.nouns) == 2]
    pictures = [
        _picture(noun_query(question.nouns[0]).sentence, *_said(question)[2:]) for question in pairs
    ]
    marks = examiner.marks(pictures, pairs)
    # The second place goes to the first noun that scores as low as the rest: by chance the right
    # one, where there are but four.
    assert marks["both objects"].hits < len(pairs) / 2
    assert marks["object"] == Share(0, 0)
    assert marks["background colour"] == Share(50, 50)


def test_shares_are_readable() -> None:
    assert str(Share(7, 8)) == "87.5 % of 8"
    assert str(Share(0, 0)) == "none asked"


def test_accuracy_asks_about_held_out_objects_apart(
    examiner: Examiner, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.recipe.accuracy.NUM_PICTURES", 64)
    monkeypatch.setattr("models.recipe.accuracy.NUM_CAPTIONS", 16)
    shares = accuracy(examiner, composer, 0)
    held_out = shares["held-out object, among these"]
    assert held_out.asked == shares["held-out object, among all"].asked < shares["object"].asked
    assert shares["caption of a picture, among 16"].asked == 16
    assert shares["object"].asked == shares["object, soft pictures"].asked


def test_psnr_of_a_known_error() -> None:
    pixels = np.full((2, 4, 4, 3), 100, np.uint8)
    decoded = pixels.copy()
    decoded[1] += 10
    # 20 log10(255 / 10)
    np.testing.assert_allclose(psnr_db(decoded, pixels)[1], 28.1308, atol=1e-3)
    assert psnr_db(decoded, pixels)[0] > 70


FOX, CAR, BLUE = noun_query("fox").sentence, noun_query("car").sentence, "on a blue background"


def _learned() -> Learned:
    vectors = np.zeros((1, 4), np.float32)
    return Learned(name="fox", vectors=vectors, initial_loss=0.5, best_loss=0.25)


def _judged(examiner: Examiner, drawn: list[RgbImage]) -> Inversion:
    images = [_picture(FOX, BLUE)] * 4
    nouns = {
        "car": examiner.evaluator.image_embeds([_picture(CAR, BLUE)] * 2),
        "apple": examiner.evaluator.image_embeds([_picture(noun_query("apple").sentence)] * 2),
    }
    return judge(drawn, _learned(), images, nouns, examiner)


def _drawn(thing: str, colours: list[str]) -> list[RgbImage]:
    coloured = [_picture(thing, background_query(colour).sentence) for colour in colours]
    return [_picture(thing, BLUE)] * len(NEUTRAL_PROMPTS) + coloured


def test_a_perfectly_learned_word(examiner: Examiner) -> None:
    word = _judged(examiner, _drawn(FOX, list(COLOURS)))
    assert word.similarity == pytest.approx(1, abs=1e-5)
    assert word.nearest_noun == "car"  # has the background in common
    assert word.nearest_similarity == pytest.approx(0.81 / 1.81, abs=1e-5)
    assert word.above_nearest
    assert word.colours == Share(len(COLOUR_PROMPTS), len(COLOUR_PROMPTS))
    assert word.named == Share(len(NEUTRAL_PROMPTS), len(NEUTRAL_PROMPTS))
    assert len(word.shown) == 16


def test_a_word_that_learned_only_the_background(examiner: Examiner) -> None:
    word = _judged(examiner, _drawn(CAR, ["blue"] * len(COLOURS)))
    assert not word.above_nearest  # not better than the car itself
    assert word.colours == Share(1, len(COLOURS))
    assert word.named.hits == 0


def test_figures_of_all_words(examiner: Examiner) -> None:
    good = _judged(examiner, _drawn(FOX, list(COLOURS)))
    bad = _judged(examiner, _drawn(CAR, ["blue"] * len(COLOURS)))
    figures = inversion_figures([good, bad])
    assert figures["above_nearest"] == {"hits": 1, "asked": 2}
    assert figures["colours"] == {"hits": 17, "asked": 32}
    assert [word["nearest_noun"] for word in figures["words"]] == ["car", "car"]


def test_the_page_holds_the_figures(examiner: Examiner) -> None:
    measured = {
        "seconds": 12,
        "command": "python -m models.recipe figures",
        "machine": {"date": "2026-11-22", "processor": "a processor", "cores": 2},
    }
    shares = {
        name: {"hits": 3, "asked": 4}
        for name in ("object", "both objects", "style", "background colour")
    }
    results: dict[str, Any] = {
        "model": "models/emoji",
        "setting": "small",
        "parts": {
            "autoencoder": {
                **measured,
                "pictures": 256,
                "image_size": 64,
                "mean_psnr_db": 30.5,
                "median_psnr_db": 30.1,
            },
            "text": {
                **measured,
                "prompts": 200,
                "sampler": "DDIM",
                "nouns": 92,
                "styles": 5,
                "colours": 16,
                "drawn": shares,
                "composed": shares,
                "accuracy": {"held-out object": {"hits": 9, "asked": 10}},
            },
            "inversion": {
                **measured,
                **inversion_figures([_judged(examiner, _drawn(FOX, list(COLOURS)))]),
            },
        },
    }
    text = page(results)
    for words in (
        "mean 30.5 dB, median 30.1 dB (bar: 26 dB)",
        "| object | 75.0 % of 4 | 75.0 % of 4 | 70 % |",
        "| background colour | 75.0 % of 4 | 75.0 % of 4 | 90 % |",
        "| held-out object | 90.0 % of 10 |",
        "| fox | 1.000 | 0.448 (car) | 100.0 % of 8 | 100.0 % of 16 |",
        "Above the nearest known word: 1 of 1 (bar: 10 of 12)",
        "`python -m models.recipe figures`, 2026-11-22, a processor, 2 cores: 12 s.",
    ):
        assert words in text
    assert "Words that it learns" not in page(
        {**results, "parts": {"text": results["parts"]["text"]}}
    )


def test_parts_are_checked() -> None:
    assert chosen_parts("text, autoencoder") == ["text", "autoencoder"]
    with pytest.raises(RecipeError, match="no part 'txt'; there are autoencoder, text, inversion"):
        chosen_parts("txt")


def test_a_missing_model_is_said(composer: Composer, tmp_path: Path) -> None:
    figures = Figures(
        model=tmp_path / "none",
        setting="small",
        composer=composer,
        every_composer=composer,
        evaluator=tmp_path,
        device=torch.device("cpu"),
        report=tmp_path / "model.json",
    )
    with pytest.raises(RecipeError, match="there is no model in .*none"):
        figures.measure(["text"], "a command")
    assert not (tmp_path / "model.json").exists()
