"""`oneword evaluate` on the real runtime with sessions that are arithmetic, and its report."""

import argparse
import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.batcher import Batcher, generate
from engine.concepts import Concept, write_concept
from engine.errors import ConceptMismatch, InvalidRequest, NumericalError, OneWordError
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest, Limits, RgbImage
from tests.fakes import DIM, FakeDenoiser, make_pipeline
from trainer import evaluate_cli, scores
from trainer.encoders import Embeds, EncoderDescription, open_encoder
from trainer.errors import NoUsableImages
from trainer.evaluation import DrawingOptions, Evaluation
from trainer.evaluation_drawing import draw, noise_seed
from trainer.evaluation_errors import EncoderError, EvaluationError, ReportError
from trainer.evaluation_prompts import Prompt, PromptSet
from trainer.evaluation_report import (
    EvaluationReport,
    read_report,
    report_from_json,
    report_to_json,
    text_table,
)
from trainer.evaluation_subjects import GREY, Subject, read_subjects, read_training_pictures

SIZE = 64  # pixels of the fake model's pictures
EMBED_DIM = 8 * 8 * 3


class ColourEncoder:
    """Pictures as 8 x 8 patches of colour; sentences as noise of their own."""

    def __init__(self, *, reads_text: bool = True, name: str = "colours") -> None:
        self.seen: list[RgbImage] = []
        self.description = EncoderDescription(
            name=name,
            kind="clip" if reads_text else "dino",
            identity="none",
            image_size=SIZE,
            reads_text=reads_text,
            judges="colours",
        )

    def image_embeds(self, images: Sequence[RgbImage]) -> Embeds:
        self.seen += images
        levels = np.stack(images).reshape(-1, 8, SIZE // 8, 8, SIZE // 8, 3) / 255.0
        return (levels.mean(axis=(2, 4)) - 0.5).reshape(-1, EMBED_DIM).astype(np.float32)

    def text_embeds(self, sentences: Sequence[str]) -> Embeds:
        seeds = [zlib.crc32(sentence.encode()) for sentence in sentences]
        vectors = [np.random.default_rng(seed).normal(size=EMBED_DIM) for seed in seeds]
        return np.array(vectors, np.float32)


PROMPTS = PromptSet(
    source="test",
    prompts=(
        Prompt(template="photo of {}", kind="likeness"),
        Prompt(template="{} red", kind="style"),
        Prompt(template="{} blurry", kind="style"),
    ),
)
OPTIONS = DrawingOptions(
    sampler="ddim", num_inference_steps=2, guidance_scale=3.0, num_samples=3, seeds=(0, 5)
)


def _concept(token: str = "<x>", *, seed: int = 0, dim: int = DIM, word: str = "cat") -> Concept:
    # Large, so that one word among the fake encoder's sixteen positions shows in the picture.
    vectors = np.random.default_rng(seed).normal(0, 10, (1, dim)).astype(np.float32)
    metadata = {"initializer_token": word} if word else {}
    return Concept(placeholder_token=token, learned_embeddings=vectors, metadata=metadata)


@pytest.fixture
def pipeline() -> Pipeline:
    return make_pipeline(FakeDenoiser(), limits=Limits(max_images_per_request=1000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training images, the second with its subject in the left half."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(2):
        levels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        image = Image.fromarray(levels)
        if seed:
            alpha = np.zeros((SIZE, SIZE), np.uint8)
            alpha[:, : SIZE // 2] = 255
            image.putalpha(Image.fromarray(alpha))
        image.save(folder / f"{seed}.png")
    return folder


def _file(folder: Path, concept: Concept, name: str = "x.safetensors") -> Path:
    write_concept(concept, path := folder / name)
    return path


def _subject(folder: Path, concept: Concept, *class_words: str) -> Subject:
    path = _file(folder.parent, concept)
    return read_subjects([str(path)], [folder], class_words, size=SIZE)[0]


# Drawing ------------------------------------------------------------------------------------------


def test_what_is_judged_is_what_is_served(pipeline: Pipeline, folder: Path) -> None:
    encoder, subject = ColourEncoder(), _subject(folder, _concept())
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
        evaluation.judge(_subject(folder, _concept()))


# Judging ------------------------------------------------------------------------------------------


def test_measures_are_those_of_the_pictures(pipeline: Pipeline, folder: Path) -> None:
    encoder, subject = ColourEncoder(), _subject(folder, _concept())
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
        dataclasses.replace(_subject(folder, _concept(seed=seed), word), label=f"{seed}")
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
        subject = _subject(folder, _concept(seed=seed))
        return [found.measures["colours"] for found in evaluation.judge(subject)]

    one, again, other = judged(0), judged(0), judged(1)
    for measures, repeated in zip(one, again, strict=True):
        for name, value in measures.items():
            # Levels off by one where pictures shared other calls.
            assert repeated[name].mean == pytest.approx(value.mean, abs=1e-4)
    assert abs(one[0]["image_similarity"].mean - other[0]["image_similarity"].mean) > 1e-4
    assert one[1] == other[1]


def test_without_a_class_word_nothing_is_measured_with_it(pipeline: Pipeline, folder: Path) -> None:
    subject = _subject(folder, _concept(word=""))
    judged = Evaluation(pipeline, [ColourEncoder()], PROMPTS, OPTIONS).judge(subject)
    assert [found.role for found in judged] == [
        "concept", "training images", "word left out", "random images",
    ]  # fmt: skip
    assert not [name for name in judged[0].measures["colours"] if "class" in name]


def test_an_encoder_without_text_measures_likeness_alone(pipeline: Pipeline, folder: Path) -> None:
    encoders = [ColourEncoder(), ColourEncoder(reads_text=False, name="dino")]
    judged = Evaluation(pipeline, encoders, PROMPTS, OPTIONS).judge(_subject(folder, _concept()))
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
            [_subject(folder, _concept())]
        )


def test_prompts_and_concepts_that_do_not_fit_are_refused_before_drawing(
    pipeline: Pipeline, folder: Path
) -> None:
    subject = _subject(folder, _concept())
    long = PromptSet(source="x", prompts=(Prompt(template="{} red" + " red" * 300),))
    with pytest.raises(EvaluationError, match="longer than the model reads"):
        Evaluation(pipeline, [ColourEncoder()], long, OPTIONS).check([subject])
    evaluation = Evaluation(pipeline, [ColourEncoder()], PROMPTS, OPTIONS)
    with pytest.raises(ConceptMismatch, match="width 7"):
        evaluation.check([subject, _subject(folder, _concept(dim=7))])


# Subjects -----------------------------------------------------------------------------------------


def test_labels_are_names_of_files_or_given(folder: Path, tmp_path: Path) -> None:
    one = _file(tmp_path, _concept())
    other = _file(tmp_path, _concept(seed=1), "y.safetensors")
    (tmp_path / "b").mkdir()
    twin = _file(tmp_path / "b", _concept(seed=2))
    subjects = read_subjects([str(one), f"best={other}"], [folder], [], size=SIZE)
    assert [subject.label for subject in subjects] == ["x", "best"]
    assert subjects[0].class_word == "cat"  # what it was initialized with
    assert subjects[0].training is subjects[1].training
    twins = read_subjects([str(one), str(twin)], [folder], ["dog"], size=SIZE)
    assert len({subject.label for subject in twins}) == 2
    assert [subject.class_word for subject in twins] == ["dog", "dog"]


def test_masks_take_the_background_away(folder: Path) -> None:
    training = read_training_pictures(folder, size=SIZE)
    assert len(training.pictures) == 2
    (without,) = training.without_background
    half = SIZE // 2
    np.testing.assert_array_equal(without[:, :half], training.pictures[1][:, :half])
    assert (without[:, half:] == GREY).all()


def test_captions_with_any_word_do_not_keep_an_image_from_being_judged(folder: Path) -> None:
    name = read_training_pictures(folder, size=SIZE).names[0]
    (folder / Path(name).with_suffix(".txt")).write_text("a photo of <some-word> on a table\n")
    training = read_training_pictures(folder, size=SIZE)
    assert len(training.pictures) == 2 and not training.skipped


def test_subjects_that_cannot_be_read_are_refused(folder: Path, tmp_path: Path) -> None:
    one = str(_file(tmp_path, _concept()))
    with pytest.raises(EvaluationError, match="--images is given 2 times for 3 concepts"):
        read_subjects([one, one, one], [folder, folder], [], size=SIZE)
    with pytest.raises(EvaluationError, match="--class-word is given 2 times for 1 concepts"):
        read_subjects([one], [folder], ["a", "b"], size=SIZE)
    with pytest.raises(EvaluationError, match="neither FILE nor LABEL=FILE"):
        read_subjects(["=x"], [folder], [], size=SIZE)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_subjects([str(tmp_path / "none.safetensors")], [folder], [], size=SIZE)
    with pytest.raises(NoUsableImages, match="none"):
        read_subjects([one], [tmp_path / "none"], [], size=SIZE)


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def command(
    pipeline: Pipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "list[str]":
    """A command line that works, on the fake model and encoders."""
    encoders = {"colours": ColourEncoder(), "dino": ColourEncoder(reads_text=False, name="dino")}
    monkeypatch.setattr(Pipeline, "open", lambda *_, **__: pipeline)
    monkeypatch.setattr(evaluate_cli, "open_encoder", lambda name, **_: encoders[name])
    path = tmp_path / "prompts.txt"
    path.write_text("[likeness]\nphoto of {}\n[style]\n{} red\n{} blurry\n")
    return [
        str(_file(tmp_path, _concept())), "--bundle", "fake", "--images", str(folder),
        "--output", str(tmp_path / "out"), "--encoder", "colours", "--prompts", str(path),
        "--num-samples", "2", "--num-inference-steps", "2", "--seeds", "0,1",
    ]  # fmt: skip


def _run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    evaluate_cli.add_arguments(parser)
    return evaluate_cli.run(parser.parse_args(words))


def test_the_command_writes_report_table_and_figure(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _file(tmp_path, _concept(seed=1), "y.safetensors")
    assert _run([f"other={other}", *command, "--encoder", "dino"]) == 0
    output = tmp_path / "out"
    assert sorted(path.name for path in output.iterdir()) == [
        "figure.png", "report.json", "table.txt",
    ]  # fmt: skip
    report = read_report(output / "report.json")
    assert [encoder.name for encoder in report.encoders] == ["colours", "dino"]
    assert [point.label for point in report.points()] == ["other", "x"]
    assert report.drawing.guidance_scale == 5.0 and report.drawing.seeds == (0, 1)
    assert report.judged[0].concept_id == _concept(seed=1).concept_id
    assert report.judged[0].masked_images == 1
    printed = capsys.readouterr()
    assert (output / "table.txt").read_text() in printed.out
    assert "2 training images, 1 with masks" in printed.out
    with Image.open(output / "figure.png") as figure:
        assert figure.format == "PNG"
    assert _run(command) == 0
    assert "report.json will be overwritten" in capsys.readouterr().err


def test_files_of_one_label_are_one_point(command: list[str], tmp_path: Path) -> None:
    others = [_file(tmp_path, _concept(seed=seed), f"{seed}.safetensors") for seed in (1, 2)]
    assert _run([*(f"tuned={path}" for path in others), *command]) == 0
    report = read_report(tmp_path / "out" / "report.json")
    tuned = [found for found in report.judged if (found.label, found.role) == ("tuned", "concept")]
    means = [found.measures["colours"]["image_similarity"].mean for found in tuned]
    assert len(means) == 2
    point = next(point for point in report.points() if point.label == "tuned")
    assert point.image_similarity == pytest.approx(np.mean(means))
    assert len(report.points()) == 2


def test_benchmark_modes_choose_the_axes(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run([*command, "--benchmark", "customconcept101", "--sampler", "euler"]) == 0
    report = read_report(tmp_path / "out" / "report.json")
    measures = report.judged[0].measures["colours"]
    (point,) = report.points()
    assert point.image_similarity == measures["image_similarity_all_prompts"].mean
    assert point.text_similarity == measures["clip_score_class_word"].mean
    assert "divide by 2.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "/no/folder"], "/no/folder"),
        (["--prompts", "/no/file"], "cannot read the prompts /no/file"),
        (["--num-samples", "0"], "--num-samples must be between 1 and 1000"),
        (["--sampler", "magic"], "unknown sampler 'magic'"),
        (["--benchmark", "dreambench-live"], "has no list"),
    ],
)
def test_bad_flags_are_refused_and_leave_nothing(
    command: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    if "--images" in words:  # repeatable: it would be a second folder
        at = command.index("--images")
        command = [*command[:at], *command[at + 2 :]]
    with pytest.raises(OneWordError, match=message):
        _run([*command, *words])
    output = tmp_path / "out"
    assert not output.exists() or not list(output.iterdir())


def test_encoders_that_read_no_text_are_not_enough(command: list[str], tmp_path: Path) -> None:
    command[command.index("colours")] = "dino"
    with pytest.raises(EvaluationError, match="no --encoder reads text"):
        _run(command)


def test_the_offline_evaluator_is_not_looked_for_on_the_hub(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = command.index("--encoder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match="the offline evaluator is not here"):
        _run([*command[:at], *command[at + 2 :]])


def test_a_benchmark_with_class_words_wants_one(command: list[str], tmp_path: Path) -> None:
    _file(tmp_path, _concept(word=""))
    with pytest.raises(EvaluationError, match="x has none; give --class-word"):
        _run([*command, "--benchmark", "customconcept101"])


def test_an_output_that_cannot_be_written_is_said_before_drawing(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EvaluationError, match="cannot write to --output"):
        _run(command)


def test_an_interruption_leaves_nothing_half_written(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Embeds:
        raise KeyboardInterrupt

    monkeypatch.setattr(ColourEncoder, "image_embeds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(command)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("seeds", ["", "a", "1,,2", "1.5"])
def test_seeds_that_are_no_numbers_are_refused(
    command: list[str], seeds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _run([*command, "--seeds", seeds])
    assert "must be whole numbers with commas between them" in capsys.readouterr().err


def test_a_folder_without_an_encoder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="neither evaluator.json .* nor config.json"):
        open_encoder(str(tmp_path))


# The report ---------------------------------------------------------------------------------------


@pytest.fixture
def report(command: list[str], tmp_path: Path) -> EvaluationReport:
    assert _run(command) == 0
    return read_report(tmp_path / "out" / "report.json")


def test_a_report_is_the_same_after_a_round_trip(report: EvaluationReport) -> None:
    again = report_from_json(report_to_json(report))
    assert again == report
    assert report_to_json(again) == report_to_json(report)


def test_the_table_says_what_was_measured_and_with_what(report: EvaluationReport) -> None:
    table = text_table(report)
    assert "3 prompts, 2 pictures each for seed 0, 1; ddim, 2 steps, guidance 5, 64 x 64" in table
    assert "judges colours" in table
    assert "the paper drew 64 pictures" in table
    value = report.judged[0].measures["colours"]["image_similarity"]
    assert value.std is not None
    assert f"{value.mean:.3f} +-{value.std:.3f}" in table
    hostile = dataclasses.replace(report.judged[0], label="\x1b[2J")
    assert "\x1b" not in text_table(dataclasses.replace(report, judged=(hostile,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "oneword-evaluation/9"}, "of schema 'oneword-evaluation/9', this version"),
        ({"judged": None}, "is not a whole report: 'None' is not of type list"),
        ({"seconds": "many"}, "'many' is not of type"),
        ({"drawing": {}}, "'model_name'"),
        ({"caveats": [1]}, "'1' is not of type str"),
    ],
)
def test_broken_reports_are_refused(
    report: EvaluationReport, change: dict[str, Any], message: str
) -> None:
    stored = {**json.loads(report_to_json(report)), **change}
    with pytest.raises(ReportError) as error:
        report_from_json(json.dumps(stored).encode())
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_report_is_refused(content: bytes) -> None:
    with pytest.raises(ReportError, match="is not JSON|of schema"):
        report_from_json(content)
