"""The course of a run: kept through stops, judged, chosen from, and written as concepts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.concepts import read_concept
from engine.errors import OneWordError
from tests import learning_setup
from tests.learning_setup import (
    COMMAND_OPTIONS,
    PatchEncoder,
    learn_arguments,
    random_images,
    tiny_model,
)
from trainer import cli, course_judge, learn_course, learn_word, scores
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.course import MAX_POINTS, CoursePoint, extended
from trainer.course_judge import CourseJudge, JudgedCourse, JudgePrompts
from trainer.errors import CheckpointError, LearningError
from trainer.evaluation_errors import EvaluationError
from trainer.evaluation_subjects import read_training_pictures
from trainer.images import read_images
from trainer.learning import learn
from trainer.model import DiffusionModel
from trainer.objective import Objective
from trainer.run import LearnState
from trainer.sampling import sample_images
from trainer.tradeoff import TradeOffPoint, choose, pareto_front

# Fixtures.
model_path, model, folder, states = (
    learning_setup.model_path,
    learning_setup.model,
    learning_setup.folder,
    learning_setup.states,
)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> PatchEncoder:
    encoder = PatchEncoder()
    monkeypatch.setattr(learn_course, "open_encoder", lambda *_, **__: encoder)
    return encoder


def _point(step: int) -> CoursePoint:
    return CoursePoint(step=step, evaluation_loss=step / 7, vectors=torch.full((1, 3), step / 3))


# --- kept ---


def test_course_holds_the_vectors_of_each_evaluation(states: list[LearnState]) -> None:
    course = states[-1].course
    assert [point.step for point in course] == [0, 2, 4, 6]
    assert tuple(point.evaluation_loss for point in course) == states[-1].evaluation_losses
    for point in course:
        assert torch.equal(point.vectors, states[point.step].vectors)


def test_course_goes_through_a_checkpoint_bit_for_bit(
    model: DiffusionModel, states: list[LearnState], folder: Path, tmp_path: Path
) -> None:
    images = read_images(folder, size=16, placeholder_token="<cat>")
    identity = RunIdentity.of(model, images, COMMAND_OPTIONS, placeholder_token="<cat>")
    write_checkpoint(tmp_path / "checkpoint", states[5], identity)
    *_, last = learn(
        model,
        images,
        COMMAND_OPTIONS,
        resume_from=read_checkpoint(tmp_path / "checkpoint", identity),
    )
    for found, expected in zip(last.course, states[-1].course, strict=True):
        assert (found.step, found.evaluation_loss) == (expected.step, expected.evaluation_loss)
        assert torch.equal(found.vectors, expected.vectors)


def test_rolled_back_run_keeps_one_point_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 0.9, math.nan, 0.8, 0.7])
    monkeypatch.setattr(Objective, "evaluate", lambda *_, **__: next(losses))
    *_, last = learn(tiny_model(tmp_path), random_images(), COMMAND_OPTIONS)
    assert [(p.step, p.evaluation_loss) for p in last.course] == [
        (0, 1.0),
        (2, 0.9),
        (4, 0.8),
        (6, 0.7),
    ]


def test_long_course_is_thinned_and_keeps_its_ends() -> None:
    course = ()
    for step in range(10 * MAX_POINTS):
        course = extended(course, _point(step))
        assert len(course) <= MAX_POINTS
        assert (course[0].step, course[-1].step) == (0, step)
    steps = [point.step for point in course]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    "damage",
    [
        {"course.2": torch.zeros(1, 24, dtype=torch.float16)},
        {"course.2": torch.zeros(24)},
        {"course.2": None},
        {"course.99": torch.zeros(1, 24)},
    ],
    ids=["dtype", "rank", "missing", "extra"],
)
def test_damaged_course_is_a_damaged_checkpoint(
    model: DiffusionModel,
    states: list[LearnState],
    tmp_path: Path,
    damage: dict[str, torch.Tensor | None],
) -> None:
    path = tmp_path / "checkpoint"
    identity = RunIdentity.of(model, random_images(), COMMAND_OPTIONS, placeholder_token="<cat>")
    write_checkpoint(path, states[-1], identity)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = {k: v for k, v in {**load_file(path), **damage}.items() if v is not None}
    save_file(tensors, path, metadata=header["__metadata__"])
    with pytest.raises(CheckpointError, match="is not a checkpoint or is damaged"):
        read_checkpoint(path, identity)


# --- without --prefer ---


def test_without_a_preference_nothing_is_drawn_and_the_lowest_loss_wins(
    model_path: Path,
    folder: Path,
    states: list[LearnState],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(course_judge, "sample_images", refuse)
    monkeypatch.setattr(learn_word, "sample_images", refuse)
    arguments = learn_arguments(model_path, tmp_path / "cat.safetensors", folder,
                                "--placeholder-token", "<cat>")  # fmt: skip
    assert cli.run(arguments) == 0
    concept = read_concept(arguments.output)
    np.testing.assert_array_equal(concept.learned_embeddings, states[-1].best_vectors.numpy())
    assert "prefer" not in concept.metadata and "course" not in concept.metadata


@pytest.mark.parametrize("more", [["--encoder", "x"], ["--prefer", "faithful"]])
def test_encoder_that_cannot_serve_is_said_before_learning(
    model_path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setattr(
        learn_course, "open_encoder", lambda *_, **__: PatchEncoder(reads_text=False)
    )
    arguments = learn_arguments(model_path, tmp_path / "cat.safetensors", folder,
                                "--placeholder-token", "<cat>", *more)  # fmt: skip
    with pytest.raises(OneWordError, match="--encoder (judges for --prefer|patches reads no text)"):
        cli.run(arguments)


# --- with --prefer ---


def _expected(model: DiffusionModel, folder: Path, concept: Any) -> tuple[float, float]:
    """Image and text similarity of a concept, one picture after another."""
    encoder = PatchEncoder()
    training = encoder.image_embeds(read_training_pictures(folder, size=16).pictures)
    backgrounds = ["on the beach", "in the snow", "in the forest", "on a blue background"]

    def embeds(prompts: list[str], seed: int) -> Any:
        drawn = sample_images(model, [concept], prompts, size=16, seed=seed, num_inference_steps=12)
        return encoder.image_embeds([np.asarray(image) for image in drawn])

    alone = np.concatenate([embeds(["a photo of <cat>"], seed) for seed in range(4)])
    edited = [embeds([f"<cat> {place}" for place in backgrounds], seed) for seed in range(2)]
    texts = scores.unit_rows(encoder.text_embeds(backgrounds))
    cosines = [(scores.unit_rows(one) * texts).sum(axis=1) for one in edited]
    similarity = scores.unit_rows(alone) @ scores.unit_rows(training).T
    return float(similarity.mean()), float(np.mean(cosines))


@pytest.mark.parametrize("prefer", ["faithful", "editable"])
def test_preferred_point_of_the_front_becomes_the_concept(
    model_path: Path,
    model: DiffusionModel,
    folder: Path,
    states: list[LearnState],
    encoder: PatchEncoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prefer: Any,
) -> None:
    arguments = learn_arguments(
        model_path,
        tmp_path / "cat.safetensors",
        *(folder, "--placeholder-token", "<cat>", "--learning-rate", "0.3"),
        *("--prefer", prefer, "--keep-checkpoints", tmp_path / "kept"),
    )
    assert cli.run(arguments) == 0
    kept = sorted((tmp_path / "kept").iterdir())
    assert [path.name for path in kept] == [f"step-0000{n}.safetensors" for n in (0, 2, 4, 6)]
    points: list[TradeOffPoint] = []
    for step, path in zip((0, 2, 4, 6), kept, strict=True):
        image, text = _expected(model, folder, read_concept(path))
        points.append(TradeOffPoint(label=str(step), image_similarity=image, text_similarity=text))
    # What is drawn before the first step has learned nothing, and is no candidate.
    chosen, front = choose(points[1:], prefer).label, pareto_front(points[1:])
    concept = read_concept(arguments.output)
    assert concept.concept_id == read_concept(kept[int(chosen) // 2]).concept_id
    assert (concept.metadata["prefer"], concept.metadata["best_step"]) == (prefer, chosen)
    assert concept.metadata["course_encoder"] == "patches"
    assert json.loads(concept.metadata["course_front"]) == sorted(int(p.label) for p in front)
    rows = [(p.label, p.image_similarity, p.text_similarity) for p in points]
    for (step, *found), (label, *expected) in zip(
        json.loads(concept.metadata["course"]), rows, strict=True
    ):
        assert str(step) == label
        # Written with four digits.
        np.testing.assert_allclose(found, expected, rtol=0, atol=6e-5)
    table = capsys.readouterr().out.splitlines()
    (taken,) = (line for line in table if line.endswith(f"front, taken ({prefer})"))
    assert taken.split()[0] == chosen
    assert sum("front" in line for line in table) == len(front)
    assert any(line.endswith("nothing learned yet") for line in table)


def test_judging_that_is_interrupted_goes_on_to_the_same_choice(
    model_path: Path,
    folder: Path,
    encoder: PatchEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [folder, "--placeholder-token", "<cat>", "--prefer", "faithful"]
    output = tmp_path / "out" / "cat.safetensors"
    assert cli.run(learn_arguments(model_path, output, *words)) == 0
    expected = output.read_bytes()
    output.unlink()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CourseJudge, "judge", interrupt)
        assert cli.run(learn_arguments(model_path, output, *words)) == 130
    assert "interrupted after step 6; " in capsys.readouterr().err
    assert cli.run(learn_arguments(model_path, output, *words, "--resume")) == 0
    concept = read_concept(output)
    output.write_bytes(expected)
    assert concept.concept_id == read_concept(output).concept_id
    assert concept.metadata["course"] == read_concept(output).metadata["course"]


def test_pictures_that_cannot_be_judged_do_not_cost_the_run(
    model_path: Path,
    folder: Path,
    encoder: PatchEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EvaluationError("embedding 0 of 4 has length nan")

    words = [folder, "--placeholder-token", "<cat>"]
    output = tmp_path / "cat.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(CourseJudge, "judge", fail)
        with pytest.raises(EvaluationError, match="after step 6; .*without --prefer, --resume"):
            cli.run(learn_arguments(model_path, output, *words, "--prefer", "editable"))
    assert cli.run(learn_arguments(model_path, output, *words, "--resume")) == 0
    assert output.is_file()


def _judged(points: list[tuple[float, float]], prefer: Any) -> JudgedCourse:
    measures = [
        TradeOffPoint(label=str(step), image_similarity=image, text_similarity=text)
        for step, (image, text) in enumerate(points)
    ]
    return JudgedCourse(
        course=tuple(_point(step) for step in range(len(points))),
        measures=tuple(measures),
        prefer=prefer,
        encoder="none",
    )


def test_start_is_never_chosen_though_it_is_most_editable() -> None:
    points = [(0.1, 0.9), (0.4, 0.5), (0.3, 0.4), (0.8, 0.45)]
    assert _judged(points, "editable").chosen.step in (1, 3)
    assert _judged(points, "faithful").chosen.step == 3
    assert [point.label for point in _judged(points, "faithful").front] == ["3", "1"]


def test_style_is_judged_by_other_prompts_than_an_object() -> None:
    prompts = JudgePrompts.for_property("style")
    for prompt in (*prompts.likeness, *prompts.edited):
        assert "in the style of {}" in prompt.template


def test_concepts_of_another_run_are_not_mixed_in(
    model_path: Path, folder: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "step-00002.safetensors").write_bytes(b"")
    arguments = learn_arguments(
        model_path,
        tmp_path / "cat.safetensors",
        *(folder, "--placeholder-token", "<cat>", "--keep-checkpoints", kept),
    )
    with pytest.raises(LearningError, match=r"step-00002.*name another folder"):
        cli.run(arguments)


def test_kept_concepts_say_which_step_they_are(
    model_path: Path, folder: Path, states: list[LearnState], tmp_path: Path
) -> None:
    arguments = learn_arguments(
        model_path,
        tmp_path / "cat.safetensors",
        *(folder, "--placeholder-token", "<cat>", "--keep-checkpoints", tmp_path / "kept"),
    )
    assert cli.run(arguments) == 0
    for point in states[-1].course:
        concept = read_concept(tmp_path / "kept" / f"step-{point.step:05d}.safetensors")
        np.testing.assert_array_equal(concept.learned_embeddings, point.vectors.numpy())
        assert concept.metadata["best_step"] == str(point.step)
        assert concept.metadata["final_evaluation_loss"] == f"{point.evaluation_loss:.6f}"
