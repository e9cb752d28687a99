"""Evaluation on the real runtime with sessions that are arithmetic: drawing and judging."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.batching.batcher import Batcher, generate
from engine.errors import ConceptMismatch, InvalidRequest, NumericalError
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest, Limits
from tests import evaluation_setup
from tests.evaluation_setup import OPTIONS, PROMPTS, ColourEncoder, make_concept, read_subject
from tests.fakes import FakeDenoiser, make_pipeline
from trainer import scores
from trainer.evaluation import Evaluation
from trainer.evaluation_drawing import draw, noise_seed
from trainer.evaluation_errors import EvaluationError
from trainer.evaluation_prompts import Prompt, PromptSet

# Fixtures.
pipeline, folder = evaluation_setup.pipeline, evaluation_setup.folder


def test_what_is_judged_is_what_is_served(pipeline: Pipeline, folder: Path) -> None:
    encoder, subject = ColourEncoder(), read_subject(folder, make_concept())
    Evaluation(pipeline, [encoder], PROMPTS, OPTIONS).judge(subject)
    request = GenerationRequest(
        prompt="<x> blurry",
        concepts=(subject.concept,),
        seed=noise_seed(5, 2) + 1,
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    batcher = Batcher(pipeline)
    (served,), _ = generate(batcher, pipeline.plan(request))
    batcher.close()
    differences = [np.abs(served.image.astype(int) - seen).max() for seen in encoder.seen]
    assert min(differences) <= 1  # an image is the same, to rounding, whatever shares its call


def test_pictures_come_with_their_request_in_order_of_seeds(pipeline: Pipeline) -> None:
    requests = [
        GenerationRequest(prompt="a cat", num_images=count, seed=10 * count, num_inference_steps=2)
        for count in (1, 4, 2)
    ]
    drawn = dict(draw(pipeline, requests))
    assert [len(drawn[place]) for place in range(3)] == [1, 4, 2]
    alone = dict(draw(pipeline, [dataclasses.replace(requests[1], seed=42, num_images=1)]))
    assert np.abs(alone[0][0].astype(int) - drawn[1][2]).max() <= 1  # to rounding


def test_no_two_pictures_share_their_noise() -> None:
    seeds = {noise_seed(s, p) + i for s in (0, 1, 7) for p in (0, 1, 999) for i in (0, 1, 999)}
    assert len(seeds) == 27


def test_a_model_that_fails_ends_the_evaluation(folder: Path) -> None:
    denoiser = FakeDenoiser()
    pipeline = make_pipeline(denoiser, limits=Limits(max_images_per_request=1000))
    evaluation = Evaluation(pipeline, [ColourEncoder()], PROMPTS, OPTIONS)
    denoiser.error = NumericalError("the model produced NaN")
    with pytest.raises(NumericalError, match="produced NaN"):
        evaluation.judge(read_subject(folder, make_concept()))


def test_measures_are_those_of_the_pictures(pipeline: Pipeline, folder: Path) -> None:
    encoder, subject = ColourEncoder(), read_subject(folder, make_concept())
    evaluation = Evaluation(pipeline, [encoder], PROMPTS, OPTIONS)
    concept, training, *_ = evaluation.judge(subject)
    measures = concept.measures["colours"]
    references = encoder.image_embeds(subject.training.pictures)
    of_seeds: list[float] = []
    for seed in OPTIONS.seeds:
        request = GenerationRequest(
            prompt="photo of <x>",
            concepts=(subject.concept,),
            num_images=3,
            seed=noise_seed(seed, 0),
            num_inference_steps=2,
            guidance_scale=3.0,
        )
        ((_, pictures),) = draw(pipeline, [request])
        of_seeds.append(scores.mean_of_cosines(encoder.image_embeds(pictures), references))
    # Levels may be off by one where the batch was another one.
    assert measures["image_similarity"].mean == pytest.approx(np.mean(of_seeds), abs=1e-4)
    assert measures["image_similarity"].count == 2
    assert measures["image_similarity"].lowest == pytest.approx(min(of_seeds), abs=1e-4)
    bound = scores.mean_among(references)
    assert training.measures["colours"]["image_similarity"].mean == pytest.approx(bound)


def test_references_are_drawn_once_and_counted(pipeline: Pipeline, folder: Path) -> None:
    subjects = [
        dataclasses.replace(read_subject(folder, make_concept(seed=seed), word), label=f"{seed}")
        for seed, word in enumerate(("cat", "cat", "dog"))
    ]
    evaluation = Evaluation(pipeline, [ColourEncoder()], PROMPTS, OPTIONS)
    counts: list[int] = []
    judged = [found for s in subjects for found in evaluation.judge(s, counts.append)]
    # Three concepts, two class words, the word left out: 3 prompts; the empty prompt: 1; x 3 x 2.
    assert sum(counts) == (6 * 3 + 1) * 3 * 2 == evaluation.num_pictures(subjects)
    roles = ["concept", "training images", "class word", "word left out", "random images"]
    assert [found.role for found in judged] == 3 * roles
    by_word = [found for found in judged if found.role == "class word"]
    assert by_word[0].measures == by_word[1].measures != by_word[2].measures


def test_the_concept_matters_and_the_noise_is_shared(pipeline: Pipeline, folder: Path) -> None:
    def judged(seed: int) -> list[dict[str, scores.Spread]]:
        evaluation = Evaluation(pipeline, [ColourEncoder()], PROMPTS, OPTIONS)
        subject = read_subject(folder, make_concept(seed=seed))
        return [found.measures["colours"] for found in evaluation.judge(subject)]

    one, again, other = judged(0), judged(0), judged(1)
    for measures, repeated in zip(one, again, strict=True):
        for name, value in measures.items():
            # Levels off by one where pictures shared other calls.
            assert repeated[name].mean == pytest.approx(value.mean, abs=1e-4)
    assert abs(one[0]["image_similarity"].mean - other[0]["image_similarity"].mean) > 1e-4
    assert one[1] == other[1]


def test_without_a_class_word_nothing_is_measured_with_it(pipeline: Pipeline, folder: Path) -> None:
    subject = read_subject(folder, make_concept(word=""))
    judged = Evaluation(pipeline, [ColourEncoder()], PROMPTS, OPTIONS).judge(subject)
    assert [found.role for found in judged] == [
        "concept", "training images", "word left out", "random images",
    ]  # fmt: skip
    assert not [name for name in judged[0].measures["colours"] if "class" in name]


def test_an_encoder_without_text_measures_likeness_alone(pipeline: Pipeline, folder: Path) -> None:
    encoders = [ColourEncoder(), ColourEncoder(reads_text=False, name="dino")]
    judged = Evaluation(pipeline, encoders, PROMPTS, OPTIONS).judge(
        read_subject(folder, make_concept())
    )
    assert not [name for name in judged[0].measures["dino"] if "text" in name or "clip" in name]
    assert judged[0].measures["dino"].keys() < judged[0].measures["colours"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "--num-samples must be between 1 and 1000, got 0"),
        ({"num_samples": 1001}, "got 1001"),
        ({"seeds": ()}, "--seeds must be different numbers, at least one, got []"),
        ({"seeds": (1, 1)}, "--seeds must be different numbers"),
        ({"seeds": (-1,)}, "--seeds must be between 0 and 1000000000, got -1"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError) as error:
        dataclasses.replace(OPTIONS, **change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "magic"}, "unknown sampler 'magic'; known: ddim, euler"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be between 0 and 100, got nan"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_drawing(
    pipeline: Pipeline, folder: Path, change: dict[str, Any], message: str
) -> None:
    options = dataclasses.replace(OPTIONS, **change)
    with pytest.raises(InvalidRequest, match=message):
        Evaluation(pipeline, [ColourEncoder()], PROMPTS, options).check(
            [read_subject(folder, make_concept())]
        )


def test_prompts_and_concepts_that_do_not_fit_are_refused_before_drawing(
    pipeline: Pipeline, folder: Path
) -> None:
    subject = read_subject(folder, make_concept())
    long = PromptSet(source="x", prompts=(Prompt(template="{} red" + " red" * 300),))
    with pytest.raises(EvaluationError, match="longer than the model reads"):
        Evaluation(pipeline, [ColourEncoder()], long, OPTIONS).check([subject])
    evaluation = Evaluation(pipeline, [ColourEncoder()], PROMPTS, OPTIONS)
    with pytest.raises(ConceptMismatch, match="width 7"):
        evaluation.check([subject, read_subject(folder, make_concept(dim=7))])
