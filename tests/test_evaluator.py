"""The evaluator: which sentences are true of a composition, and its files against torch."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engine.requests import RgbImage
from models.recipe.compositions import Composer, Composition, Shown
from models.recipe.evaluator import EvaluatorNetwork, choice_loss, sigmoid_loss
from models.recipe.evaluator_files import export_evaluator
from models.recipe.evaluator_stage import make_evaluator
from models.recipe.exam import Share
from models.recipe.icons import Icon, read_pack
from models.recipe.lessons import BATCH_SIZE, augmented, new_lesson, new_tokenizer, tokenized
from models.recipe.pictures import to_tensor
from models.recipe.truths import (
    FALSE,
    TRUE,
    UNKNOWN,
    Query,
    Thing,
    altered_query,
    background_query,
    caption_query,
    noun_query,
    partial_query,
    rephrased,
    style_query,
    told,
    truth_matrix,
)
from tests.recipe_toy import TINY, UNSEEN, write_pack
from trainer.evaluator import (
    IMAGE_FILE,
    SPEC_FILE,
    TOKENIZER_FILE,
    Evaluator,
    EvaluatorError,
    mean_similarity,
)

NOUNS = ("fox", "car", "apple", "grapes")
STYLES = ("noto", "twemoji")
CPU = torch.device("cpu")
# Weights rounded to 11 bits change the components of a unit vector (about 0.09 each) by 1e-4 here.
HALF_TOLERANCE = 1e-3


def _composition(*shown: Shown, background: str = "blue", kind: str = "plain") -> Composition:
    return Composition(np.zeros((8, 8, 3), np.uint8), "a caption", shown, kind, background)


def _shown(noun: str, colour: str | None = None, count: int = 1) -> Shown:
    return Shown(noun, "noto", colour, (0, 0, 8), count)


FOX = _composition(_shown("fox"))
RED_CAR_AND_FOX = _composition(_shown("car", "red"), _shown("fox"), background="forest")
TWO_FOXES = _composition(_shown("fox", count=2), _shown("fox", count=2), background="striped")
PICTURES = (FOX, RED_CAR_AND_FOX, TWO_FOXES)


@pytest.mark.parametrize(
    ("query", "truths"),
    [
        (noun_query("fox"), (TRUE, TRUE, TRUE)),
        (noun_query("car"), (FALSE, TRUE, FALSE)),
        (noun_query("owl"), (FALSE, FALSE, FALSE)),
        (style_query("noto"), (TRUE, TRUE, TRUE)),
        (style_query("twemoji"), (FALSE, FALSE, FALSE)),
        (background_query("blue"), (TRUE, FALSE, FALSE)),
        (background_query("forest"), (FALSE, TRUE, FALSE)),
        (background_query("striped"), (FALSE, FALSE, TRUE)),
        # One or more will do where no number is given; a number is meant exactly.
        (told((Thing(noun="fox", count=2),), style=None, background=None), (FALSE, FALSE, TRUE)),
        (told((Thing(noun="fox", count=1),), style=None, background=None), (TRUE, TRUE, FALSE)),
        # A fox as its set draws it may be red already.
        (
            told((Thing(noun="fox", colour="red"),), style=None, background=None),
            (UNKNOWN, UNKNOWN, UNKNOWN),
        ),
        (
            told((Thing(noun="car", colour="red"),), style=None, background=None),
            (FALSE, TRUE, FALSE),
        ),
        (
            told((Thing(noun="car", colour="blue"),), style=None, background=None),
            (FALSE, FALSE, FALSE),
        ),
        (
            told((Thing(noun="fox"), Thing(noun="car")), style="noto", background="forest"),
            (FALSE, TRUE, FALSE),
        ),
        # One claim that is false decides, whatever the others are.
        (
            told((Thing(noun="fox", colour="red"),), style="twemoji", background=None),
            (FALSE, FALSE, FALSE),
        ),
    ],
)
def test_truth_of_a_sentence_about_three_pictures(query: Query, truths: tuple[int, ...]) -> None:
    assert truth_matrix([query], PICTURES)[:, 0].tolist() == list(truths)


def test_sentences_are_plain_english() -> None:
    two_cars = (Thing(noun="car", colour="red", count=2), Thing(noun="apple"))
    query = told(two_cars, style="twemoji", background="forest")
    assert query.sentence == "two red cars and an apple in the forest in twemoji style"
    assert background_query("teal").sentence == "on a teal background"


def test_truths_of_no_pictures_and_no_sentences_have_a_shape() -> None:
    assert truth_matrix([], PICTURES).shape == (3, 0)
    assert truth_matrix([noun_query("fox")], []).shape == (0, 1)


@pytest.fixture(scope="module")
def composer() -> Composer:
    """Compositions of discs and squares that stand for objects."""
    icons: list[Icon] = []
    for place, noun in enumerate(NOUNS):
        for step, style in enumerate(STYLES):
            pixels = np.zeros((96, 96, 4), np.uint8)
            pixels[8 : 90 - 9 * place, 8 : 40 + 12 * place] = (60 * place, 120 * step, 90, 255)
            icons.append(Icon(noun, noun, style, pixels))
    return Composer(icons, 64)


def test_what_is_told_of_a_composition_is_true_of_it(composer: Composer) -> None:
    rng = np.random.default_rng(0)
    for index in range(300):
        composition = composer.compose(index)
        queries = [partial_query(composition, rng), caption_query(composition)]
        assert truth_matrix(queries, [composition]).tolist() == [[TRUE, UNKNOWN]]


def test_captions_are_not_held_to_a_background_that_they_leave_out(composer: Composer) -> None:
    silent = [
        query
        for query in map(caption_query, map(composer.compose, range(300)))
        if query.background is None
    ]
    assert silent
    assert not [query for query in silent if "background" in query.sentence]


def test_altered_sentences_are_mostly_false(composer: Composer) -> None:
    rng = np.random.default_rng(0)
    truths: list[int] = []
    for index in range(300):
        composition = composer.compose(index)
        query = altered_query(composition, NOUNS, STYLES, rng)
        truths.append(int(truth_matrix([query], [composition])[0, 0]))
    # With four nouns and two styles chance puts many of them right again.
    assert truths.count(FALSE) > 130


def test_other_words_claim_the_same() -> None:
    rng = np.random.default_rng(0)
    plain = [noun_query("fox"), style_query("noto"), background_query("blue")]
    plain += [background_query("forest"), background_query("dotted")]
    for query in plain:
        others = [rephrased(query, rng) for _ in range(20)]
        assert len({other.sentence for other in others}) > 1
        for other in others:
            found = (other.things, other.style, other.background)
            assert found == (query.things, query.style, query.background)


def test_unknown_pairs_cost_nothing() -> None:
    truths = torch.tensor([[1.0, 0.0, -1.0]])
    loss = sigmoid_loss(torch.tensor([[2.0, 1.0, 9.0]]), truths)
    # -log sigmoid(2) - log sigmoid(-1)
    assert loss.item() == pytest.approx(0.126928 + 1.313262, abs=1e-5)


def test_a_choice_costs_the_log_of_what_is_given_to_the_true_ones() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0], [3.0, 0.0, 0.0, 5.0]])
    truths = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, -1.0, 1.0]])
    loss = choice_loss(logits, truths, [slice(0, 3), slice(3, 4)])
    one = np.log(1 + np.e + np.e**2) - 1.5  # half of it wanted at each of the two
    other = np.log(np.e**3 + 2) - 3
    assert loss.item() == pytest.approx((one + other) / 2, abs=1e-5)


@pytest.fixture(scope="module")
def tokenizer(composer: Composer) -> Tokenizer:
    return new_tokenizer(composer)


def test_lessons_repeat_and_know_whose_a_caption_is(
    composer: Composer, tokenizer: Tokenizer
) -> None:
    torch.manual_seed(0)
    lesson = new_lesson(composer, tokenizer, BATCH_SIZE, CPU)
    torch.manual_seed(0)
    again = new_lesson(composer, tokenizer, BATCH_SIZE, CPU)
    assert torch.equal(lesson.pixels, again.pixels)
    assert torch.equal(lesson.truths, again.truths)
    for group, other in zip(lesson.sentences, again.sentences, strict=True):
        assert torch.equal(group.input_ids, other.input_ids)
    captions = lesson.truths[:24, -24:]
    assert (captions.diagonal() == TRUE).all()
    assert not (captions - torch.diag(captions.diagonal()) == TRUE).any()
    for columns in lesson.choices:
        assert (lesson.truths[:, columns] == TRUE).any(dim=1).all()


def test_augmented_pictures_stay_pictures() -> None:
    """A flat picture is moved, blurred and reduced to itself, but for noise and shade."""
    flat = torch.full((16, 3, 64, 64), 0.5)
    result = augmented(flat, np.random.default_rng(0))
    assert result.shape == flat.shape
    assert result.abs().max() <= 1
    # Gain 0.88 to 1.08, three deviations of the offset.
    assert (result.mean(dim=(2, 3)) - 0.5).abs().max() < 0.5 * 0.12 + 3 * 0.04


@pytest.fixture(scope="module")
def network(tokenizer: Tokenizer) -> EvaluatorNetwork:
    torch.manual_seed(0)
    network = EvaluatorNetwork(tokenizer.get_vocab_size())
    # Residual branches begin as zero, and would not be seen.
    for parameter in network.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return network.eval()


@pytest.fixture(scope="module")
def folder(
    network: EvaluatorNetwork, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("evaluator")
    held_out = ["fox"]
    export_evaluator(
        network, tokenizer, folder, nouns=NOUNS, held_out_nouns=held_out, styles=STYLES
    )
    return folder


@pytest.fixture(scope="module")
def evaluator(folder: Path) -> Evaluator:
    return Evaluator.open(folder, num_threads=1)


def _pictures(count: int, side: int = 64) -> list[RgbImage]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))


SENTENCES = ("a fox", "a fox and a red car on a blue background in noto style", "ZEBRAS, 2 of them")


@torch.no_grad()
def test_embeddings_are_those_of_torch(
    evaluator: Evaluator, network: EvaluatorNetwork, tokenizer: Tokenizer
) -> None:
    pictures = _pictures(3)
    images = network.image_encoder(to_tensor(np.stack(pictures), CPU)).numpy()
    tokens = tokenized(tokenizer, SENTENCES)
    sentences = network.text_encoder(tokens.input_ids, tokens.attention_mask).numpy()
    found = evaluator.image_embeds(pictures)
    np.testing.assert_allclose(found, images, atol=HALF_TOLERANCE)
    np.testing.assert_allclose(evaluator.text_embeds(SENTENCES), sentences, atol=HALF_TOLERANCE)
    logits = network(to_tensor(np.stack(pictures), CPU), [tokens])
    # Cosines of 128 such products, times the scale of 10.
    np.testing.assert_allclose(
        evaluator.logits(found, evaluator.text_embeds(SENTENCES)), logits.numpy(), atol=0.05
    )


def test_embeddings_do_not_depend_on_their_batch(evaluator: Evaluator) -> None:
    pictures = _pictures(66)  # more than one call takes
    alone = np.concatenate([evaluator.image_embeds([pictures[i]]) for i in (0, 64, 65)])
    together = evaluator.image_embeds(pictures)
    # Sums of float32 in another order.
    np.testing.assert_allclose(together[[0, 64, 65]], alone, atol=1e-5)
    # A long neighbour pads the short sentence, and padding must not be looked at.
    short = evaluator.text_embeds(SENTENCES[:1])
    np.testing.assert_allclose(evaluator.text_embeds(SENTENCES)[:1], short, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_nothing_gives_no_embeddings(evaluator: Evaluator) -> None:
    assert evaluator.image_embeds([]).shape == (0, 128)
    assert evaluator.text_embeds([]).shape == (0, 128)


@pytest.mark.parametrize("times", [2, 4])
def test_enlarged_pictures_are_read_as_their_originals(evaluator: Evaluator, times: int) -> None:
    pictures = _pictures(2)
    larger = [picture.repeat(times, axis=0).repeat(times, axis=1) for picture in pictures]
    # The mean over an area of equal levels is that level; sizes may differ within a call.
    mixed = evaluator.image_embeds([pictures[0], larger[1]])
    np.testing.assert_array_equal(mixed, evaluator.image_embeds(pictures))


def test_sizes_that_do_not_divide_change_little(evaluator: Evaluator) -> None:
    rows, columns = np.mgrid[0:300, 0:300] / 300
    smooth = np.stack([rows, columns, 1 - rows], axis=-1)
    large = (255 * smooth).astype(np.uint8)
    sizes = [large[::2, ::2], large[::3, ::3], large[::5, ::5], large]  # 150, 100, 60, 300 pixels
    embeds = evaluator.image_embeds(sizes)
    assert (embeds @ embeds[-1]).min() > 0.999


def test_mean_similarity_is_over_all_pairs() -> None:
    images = np.array([[1, 0], [0, 1]], np.float32)
    references = np.array([[1, 0], [1, 0], [0.6, 0.8]], np.float32)
    assert mean_similarity(images, references) == pytest.approx((1 + 1 + 0.6 + 0 + 0 + 0.8) / 6)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 48, 3), np.uint8), "48 x 64 pixels; give a square"),
        (np.zeros((4, 4, 3), np.uint8), "at least 8 pixels"),
        (np.zeros((64, 64), np.uint8), "of shape (height, width, 3)"),
        (np.zeros((64, 64, 4), np.uint8), "of shape (height, width, 3)"),
        (np.full((64, 64, 3), np.nan, np.float32), "dtype float32; give RGB levels as uint8"),
    ],
)
def test_unusable_pictures_are_refused(
    evaluator: Evaluator, picture: np.ndarray, message: str
) -> None:
    with pytest.raises(EvaluatorError) as error:
        evaluator.image_embeds([*_pictures(1), picture])
    assert "picture 1" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("sentence", "message"), [("", "'' says nothing"), ("a fox " * 40, "reads 32; shorten it")]
)
def test_unusable_sentences_are_refused(evaluator: Evaluator, sentence: str, message: str) -> None:
    with pytest.raises(EvaluatorError, match=message):
        evaluator.text_embeds(["a fox", sentence])


def _damage(folder: Path, target: Path, name: str, content: bytes | None) -> Path:
    shutil.copytree(folder, target)
    if content is None:
        (target / name).unlink()
    else:
        (target / name).write_bytes(content)
    return target


@pytest.mark.parametrize("name", [IMAGE_FILE, TOKENIZER_FILE, SPEC_FILE])
def test_missing_files_are_named(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(EvaluatorError, match=f"cannot read .*{name}: No such file.*make it anew"):
        Evaluator.open(_damage(folder, tmp_path / "copy", name, None))


def test_truncated_and_altered_files_are_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / IMAGE_FILE).read_bytes()
    altered = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for place, content in enumerate((whole[:-100], altered)):
        copy = _damage(folder, tmp_path / str(place), IMAGE_FILE, content)
        with pytest.raises(EvaluatorError, match=f"{IMAGE_FILE} is not the file .* truncated or"):
            Evaluator.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "oneword-evaluator/9"}, "of format 'oneword-evaluator/9'"),
        ({"logit_scale": None}, "logit_scale is None"),
        ({"nouns": "fox"}, "nouns is 'fox'"),
        ({"sha256": None}, "sha256 is None"),
    ],
)
def test_a_wrong_description_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    stored = json.loads((folder / SPEC_FILE).read_text())
    content = json.dumps({**stored, **change}).encode()
    with pytest.raises(EvaluatorError, match=message):
        Evaluator.open(_damage(folder, tmp_path / "copy", SPEC_FILE, content))


@pytest.mark.parametrize(
    ("content", "message"), [(b'{"format": "one', "is not JSON"), (b"[]", "does not describe")]
)
def test_a_broken_description_is_refused(
    folder: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(EvaluatorError, match=message):
        Evaluator.open(_damage(folder, tmp_path / "copy", SPEC_FILE, content))


def test_a_description_that_lacks_a_key_is_refused(folder: Path, tmp_path: Path) -> None:
    stored = json.loads((folder / SPEC_FILE).read_text())
    del stored["pixel_mean"]
    with pytest.raises(EvaluatorError, match="lacks pixel_mean"):
        copy = _damage(folder, tmp_path / "copy", SPEC_FILE, json.dumps(stored).encode())
        Evaluator.open(copy)


def test_weights_are_stored_in_half(folder: Path, network: EvaluatorNetwork) -> None:
    values = sum(parameter.numel() for parameter in network.image_encoder.parameters())
    assert (folder / IMAGE_FILE).stat().st_size < 2.1 * values


def test_the_evaluator_is_made_in_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.recipe.lessons._CORPUS_COMPOSITIONS", 100)
    monkeypatch.setattr("models.recipe.evaluator._STATISTICS_BATCHES", 1)
    monkeypatch.setattr("models.recipe.evaluator_stage.HELD_OUT_OBJECTS", (UNSEEN,))
    monkeypatch.setattr("models.recipe.accuracy.NUM_PICTURES", 64)
    monkeypatch.setattr("models.recipe.accuracy.NUM_CAPTIONS", 16)
    pack = write_pack(tmp_path / "icons.zip")
    make = functools.partial(
        make_evaluator,
        TINY,
        pack=pack,
        folder=tmp_path / "work",
        target=tmp_path / "evaluator",
        device=CPU,
        exposures=3,  # 5 objects in 5 styles: two steps
    )
    assert make(minutes=0) is None
    assert not (tmp_path / "evaluator").exists()
    shares = make()
    assert shares and shares["object"].asked > 10
    spec = Evaluator.open(tmp_path / "evaluator").spec
    nouns = {icon.slug: icon.noun for icon in read_pack(pack)}
    assert spec.nouns == tuple(sorted(nouns.values()))
    assert spec.held_out_nouns == (nouns[UNSEEN],)
    stored = json.loads((tmp_path / "evaluator" / SPEC_FILE).read_text())["accuracy"]
    assert {name: Share(**share) for name, share in stored.items()} == shares
