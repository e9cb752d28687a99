"""The measures against numbers done by hand and laws, and the choice of a point."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import scores
from trainer.evaluation_errors import EvaluationError
from trainer.evaluation_measures import MEASURES, Yardsticks, measure, measure_training_images
from trainer.evaluation_prompts import Prompt, PromptSet
from trainer.tradeoff import TradeOffPoint, choose, pareto_front

ONE = np.array([[1, 0], [0, 1]], np.float32)
OTHER = np.array([[1, 0], [0.6, 0.8]], np.float32)
# Sums of some ten float64 products of numbers up to 1, fed float32 values.
EXACT: dict[str, Any] = {"abs": 1e-7}


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    # Off centre, as embeddings of pictures are, so that no mean vanishes.
    return np.random.default_rng(seed).normal(0.3, 1.0, shape)


def test_two_readings_by_hand() -> None:
    assert scores.mean_of_cosines(ONE, OTHER) == pytest.approx((1 + 0.6 + 0 + 0.8) / 4, **EXACT)
    # Means (0.5, 0.5) and (0.8, 0.4).
    expected = 0.6 / np.sqrt(0.5 * 0.8)
    assert scores.cosine_of_means(ONE, OTHER) == pytest.approx(expected, **EXACT)


def test_mean_of_cosines_is_that_over_all_pairs() -> None:
    one, other = _random(5, 7), _random(3, 7, seed=1)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in one for b in other]
    assert scores.mean_of_cosines(one, other) == pytest.approx(np.mean(cosines), **EXACT)


def test_the_readings_differ_by_the_lengths_of_the_means() -> None:
    one, other = _random(5, 7), _random(3, 7, seed=1)
    lengths = [np.linalg.norm(scores.unit_rows(rows).mean(axis=0)) for rows in (one, other)]
    mean, of_means = scores.mean_of_cosines(one, other), scores.cosine_of_means(one, other)
    assert mean == pytest.approx(of_means * lengths[0] * lengths[1], **EXACT)
    assert abs(mean) < abs(of_means)


@pytest.mark.parametrize("score", [scores.mean_of_cosines, scores.cosine_of_means])
def test_laws_of_both_readings(score: Callable[[np.ndarray, np.ndarray], float]) -> None:
    one, other = _random(5, 7), _random(3, 7, seed=1)
    same = np.repeat(_random(1, 7), 4, axis=0)
    assert score(same, same) == pytest.approx(1, **EXACT)
    assert score(same, -same) == pytest.approx(-1, **EXACT)
    assert score(one, other) == pytest.approx(score(other, one), **EXACT)
    assert score(one[::-1], other[[2, 0, 1]]) == pytest.approx(score(one, other), **EXACT)
    longer = one * np.array([[1], [2], [3], [40], [0.5]])
    assert score(longer, other) == pytest.approx(score(one, other), **EXACT)


def test_images_among_each_other_leave_themselves_out() -> None:
    rows = _random(4, 7)
    units = scores.unit_rows(rows)
    pairs = [units[i] @ units[j] for i, j in itertools.permutations(range(4), 2)]
    assert scores.mean_among(rows) == pytest.approx(np.mean(pairs), **EXACT)
    assert scores.mean_among(rows[:1]) is None


def test_diversity_is_within_prompts() -> None:
    copies = np.stack([np.repeat(_random(1, 7, seed=seed), 3, axis=0) for seed in range(2)])
    assert scores.diversity(copies) == pytest.approx(0, **EXACT)
    across = np.stack([ONE, OTHER])  # cosines 0 and 0.6
    assert scores.diversity(across) == pytest.approx(1 - 0.3, **EXACT)
    assert scores.diversity(copies[:, :1]) is None


def test_pictures_are_held_to_their_own_prompt() -> None:
    samples = np.stack([ONE, OTHER])
    texts = np.array([[0, 2], [3, 0]], np.float32)
    cosines = scores.paired_cosines(samples, texts)
    np.testing.assert_allclose(cosines, [[0, 1], [1, 0.6]], atol=1e-7)
    # Means (0.5, 0.5) and (0.8, 0.4).
    expected = (np.sqrt(0.5) + 0.8 / np.sqrt(0.8)) / 2
    assert scores.paired_cosine_of_means(samples, texts) == pytest.approx(expected, **EXACT)


def test_clip_score_clips_before_it_averages() -> None:
    assert scores.clip_score(np.array([[0.4, -0.4]])) == pytest.approx(0.5, **EXACT)


def test_spread_by_hand() -> None:
    assert scores.spread([1.0, 2.0, 3.0]) == scores.Spread(
        mean=2.0, std=1.0, lowest=1.0, highest=3.0, count=3
    )
    assert scores.spread([5.0]).std is None


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_a_vector_without_direction_is_refused(broken: float) -> None:
    rows = _random(3, 7)
    rows[1] = broken
    with pytest.raises(EvaluationError, match="embedding 1 of 3 has length"):
        scores.mean_of_cosines(rows, rows)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no picture to compare"):
        scores.mean_of_cosines(np.zeros((0, 7)), _random(3, 7))
    with pytest.raises(EvaluationError, match="nothing to average"):
        scores.spread([])


# All measures of a set of pictures ----------------------------------------------------------------

PROMPTS = PromptSet(
    source="test",
    prompts=(
        Prompt(template="a photo of {}", kind="likeness"),
        Prompt(template="{} in the snow", kind="background"),
        Prompt(template="a drawing of {}", kind="style"),
    ),
)


def test_likeness_is_of_likeness_prompts_and_text_of_the_others() -> None:
    samples, training, texts = _random(3, 4, 7), _random(2, 7, seed=1), _random(2, 7, seed=2)
    found = measure(samples, PROMPTS, Yardsticks(training=training, texts=texts))
    every = samples.reshape(-1, 7)
    assert found["image_similarity"] == scores.mean_of_cosines(samples[0], training)
    assert found["image_similarity_of_means"] == scores.cosine_of_means(samples[0], training)
    assert found["image_similarity_all_prompts"] == scores.mean_of_cosines(every, training)
    cosines = scores.paired_cosines(samples[1:], texts)
    assert found["text_similarity"] == pytest.approx(cosines.mean(), **EXACT)
    assert found["clip_score"] == scores.clip_score(cosines)
    assert found["diversity"] == scores.diversity(samples)


def test_every_measure_is_explained_on_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in MEASURES if f"`{name}`" not in page] == []


def test_what_cannot_be_measured_is_absent() -> None:
    bare = measure(_random(3, 1, 7), PROMPTS, Yardsticks(training=_random(2, 7)))
    assert set(bare) == {
        "image_similarity",
        "image_similarity_of_means",
        "image_similarity_all_prompts",
    }
    assert measure_training_images(Yardsticks(training=_random(1, 7))) == {}


def test_masked_likeness_is_to_the_masked_images() -> None:
    samples, training, masked = _random(3, 4, 7), _random(2, 7, seed=1), _random(1, 7, seed=3)
    found = measure(samples, PROMPTS, Yardsticks(training=training, masked=masked))
    assert found["image_similarity_masked"] == scores.mean_of_cosines(samples[0], masked)


def test_training_images_are_the_upper_bound_of_copies_of_them() -> None:
    """What draws the training images themselves cannot look more like them than 1/n above."""
    training = _random(4, 7)
    bound = measure_training_images(Yardsticks(training=training, texts=_random(2, 7, seed=2)))
    copies = measure(np.stack([training] * 3), PROMPTS, Yardsticks(training=training))
    among = bound["image_similarity"]
    # Copies meet themselves in one pair of four: mean = (3 among + 1) / 4.
    assert copies["image_similarity"] == pytest.approx((3 * among + 1) / 4, **EXACT)
    assert bound["diversity"] == pytest.approx(1 - among, **EXACT)
    assert "text_similarity" in bound


# The Pareto front, and a point of it --------------------------------------------------------------


def _points(*places: tuple[float, float]) -> list[TradeOffPoint]:
    return [
        TradeOffPoint(label=str(index), image_similarity=image, text_similarity=text)
        for index, (image, text) in enumerate(places)
    ]


def _labels(points: "tuple[TradeOffPoint, ...]") -> str:
    return "".join(point.label for point in points)


def test_the_front_by_hand() -> None:
    #                 on it       on it       beaten by 1  twin of 1   level with 0, below
    points = _points((0.9, 0.1), (0.7, 0.6), (0.6, 0.5), (0.7, 0.6), (0.9, 0.05), (0.2, 0.9))
    assert _labels(pareto_front(points)) == "0135"
    assert pareto_front([]) == ()


def test_no_point_of_the_front_is_beaten_and_every_other_is() -> None:
    points = _points(*map(tuple, np.random.default_rng(0).integers(0, 8, (60, 2)) / 8))
    front = pareto_front(points)
    beaten = [point for point in points if point not in front]
    assert front and beaten
    assert not any(other.dominates(point) for point in front for other in points)
    assert all(any(other.dominates(point) for other in front) for point in beaten)
    assert set(pareto_front(points[::-1])) == set(front)


def test_a_preference_counts_twice() -> None:
    # In shares of the front: (1, 0), (0.7, 0.5), (0.5, 0.7), (0, 1).
    points = _points((0.9, 0.2), (0.75, 0.3), (0.65, 0.34), (0.4, 0.4))
    # 2 image + text: 2, 1.9, 1.7, 1; and image + 2 text: 1, 1.7, 1.9, 2.
    assert choose(points, "faithful").label == "0"
    assert choose(points, "editable").label == "3"
    # A knee gains more than it costs, whatever is preferred.
    with_knee = [*points, *_points((0.85, 0.39))]
    assert choose(with_knee, "faithful") is with_knee[-1]
    assert choose(with_knee, "editable") is with_knee[-1]


def test_a_choice_does_not_depend_on_the_scale_of_a_measure() -> None:
    places = [tuple(place) for place in _random(30, 2)]
    stretched = [(0.1 * image - 3, 7 * text + 2) for image, text in places]
    for prefer in ("faithful", "editable"):
        assert choose(_points(*places), prefer).label == choose(_points(*stretched), prefer).label


def test_one_point_is_chosen_and_of_equal_ones_the_first() -> None:
    assert choose(_points((0.5, 0.5)), "editable").label == "0"
    assert choose(_points((0.1, 0.1), (0.5, 0.5), (0.5, 0.5)), "faithful").label == "1"


def test_choices_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no point to choose"):
        choose([], "faithful")
    with pytest.raises(EvaluationError, match="cannot prefer 'cheap'; choose 'faithful' or"):
        choose(_points((0.5, 0.5)), "cheap")  # pyright: ignore[reportArgumentType]
    with pytest.raises(EvaluationError, match="text_similarity of '0' is nan"):
        _points((0.5, float("nan")))
