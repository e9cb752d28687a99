"""`oneword evaluate` on the real runtime with sessions that are arithmetic."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import OneWordError
from tests import evaluation_setup
from tests.evaluation_setup import ColourEncoder, make_concept, run_command, write_file
from trainer.encoders import Embeds, open_encoder
from trainer.evaluation_errors import EncoderError, EvaluationError
from trainer.evaluation_report import read_report

# Fixtures.
pipeline, folder, command = (
    evaluation_setup.pipeline,
    evaluation_setup.folder,
    evaluation_setup.command,
)


def test_the_command_writes_report_table_and_figure(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_file(tmp_path, make_concept(seed=1), "y.safetensors")
    assert run_command([f"other={other}", *command, "--encoder", "dino"]) == 0
    output = tmp_path / "out"
    assert sorted(path.name for path in output.iterdir()) == [
        "figure.png", "report.json", "table.txt",
    ]  # fmt: skip
    report = read_report(output / "report.json")
    assert [encoder.name for encoder in report.encoders] == ["colours", "dino"]
    assert [point.label for point in report.points()] == ["other", "x"]
    assert report.drawing.guidance_scale == 5.0 and report.drawing.seeds == (0, 1)
    assert report.judged[0].concept_id == make_concept(seed=1).concept_id
    assert report.judged[0].masked_images == 1
    printed = capsys.readouterr()
    assert (output / "table.txt").read_text() in printed.out
    assert "2 training images, 1 with masks" in printed.out
    with Image.open(output / "figure.png") as figure:
        assert figure.format == "PNG"
    assert run_command(command) == 0
    assert "report.json will be overwritten" in capsys.readouterr().err


def test_files_of_one_label_are_one_point(command: list[str], tmp_path: Path) -> None:
    others = [
        write_file(tmp_path, make_concept(seed=seed), f"{seed}.safetensors") for seed in (1, 2)
    ]
    assert run_command([*(f"tuned={path}" for path in others), *command]) == 0
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
    assert run_command([*command, "--benchmark", "customconcept101", "--sampler", "euler"]) == 0
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
        run_command([*command, *words])
    output = tmp_path / "out"
    assert not output.exists() or not list(output.iterdir())


def test_encoders_that_read_no_text_are_not_enough(command: list[str], tmp_path: Path) -> None:
    command[command.index("colours")] = "dino"
    with pytest.raises(EvaluationError, match="no --encoder reads text"):
        run_command(command)


def test_the_offline_evaluator_is_not_looked_for_on_the_hub(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = command.index("--encoder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match="the offline evaluator is not here"):
        run_command([*command[:at], *command[at + 2 :]])
    assert not (tmp_path / "out").exists()


def test_a_benchmark_with_class_words_wants_one(command: list[str], tmp_path: Path) -> None:
    write_file(tmp_path, make_concept(word=""))
    with pytest.raises(EvaluationError, match="x has none; give --class-word"):
        run_command([*command, "--benchmark", "customconcept101"])


def test_an_output_that_cannot_be_written_is_said_before_drawing(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EvaluationError, match="cannot write to --output"):
        run_command(command)


def test_an_interruption_leaves_nothing_half_written(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Embeds:
        raise KeyboardInterrupt

    monkeypatch.setattr(ColourEncoder, "image_embeds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_command(command)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("seeds", ["", "a", "1,,2", "1.5"])
def test_seeds_that_are_no_numbers_are_refused(
    command: list[str], seeds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command([*command, "--seeds", seeds])
    assert "must be whole numbers with commas between them" in capsys.readouterr().err


def test_a_folder_without_an_encoder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="neither evaluator.json .* nor config.json"):
        open_encoder(str(tmp_path))
