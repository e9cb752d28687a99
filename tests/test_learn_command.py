"""`oneword learn` as a user meets it: files in, a concept out, and no run lost on the way."""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image

from engine.concepts import Concept, read_concept
from engine.errors import ConceptUnreadable, OneWordError
from engine.files import sha256_of_file
from tests.learning_setup import image_folder, learn_arguments, make_tiny
from trainer import cli, learn_job, learn_word
from trainer.errors import CheckpointError, Diverged, LearningError, NoGradient
from trainer.learn_arguments import options_from
from trainer.learning import learn_together
from trainer.model import load_model
from trainer.objective import Objective
from trainer.options import LearnOptions
from trainer.run import LearnState
from trainer.sampling import sample_images
from trainer.splicing import text_spec


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


def _arguments(model: Path, folder: Path, *more: str) -> argparse.Namespace:
    output = folder.parent / "out" / "cat.safetensors"
    return learn_arguments(model, output, folder, "--placeholder-token", "<cat>", *more)


def test_defaults_of_the_command_are_those_of_the_options(model_path: Path, folder: Path) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    parsed = parser.parse_args(["i", "--model", "m", "--output", "o", "--placeholder-token", "<x>"])
    assert options_from(parsed) == LearnOptions()


def test_concept_file_holds_the_best_vectors_and_how_they_came_to_be(
    model_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "notes.txt").write_text("not an image")
    arguments = _arguments(model_path, folder, "--initializer-token", "red cat", "--seed", "3")
    assert cli.run(arguments) == 0
    concept = read_concept(arguments.output)
    model = load_model(model_path)
    assert concept.placeholder_token == "<cat>"
    assert concept.embedding_fingerprint == text_spec(model).embedding_fingerprint
    assert concept.metadata["steps"] == "6"
    assert concept.metadata["seed"] == "3"
    assert concept.metadata["initializer_token"] == "red cat"
    assert json.loads(concept.metadata["image_sha256"]) == [
        sha256_of_file(folder / "0.png"),
        sha256_of_file(folder / "1.png"),
    ]
    initial = float(concept.metadata["initial_evaluation_loss"])
    assert float(concept.metadata["final_evaluation_loss"]) <= initial
    assert [path.name for path in arguments.output.parent.iterdir()] == ["cat.safetensors"]
    printed = capsys.readouterr().out
    assert "2 images, 16 x 16 pixels: 0.png, 1.png" in printed
    assert "skipped notes.txt: not an image" in printed
    assert f"evaluation loss {initial:.4f} -> " in printed


def test_denoiser_can_be_in_half_precision_and_in_parts(model_path: Path, folder: Path) -> None:
    arguments = _arguments(model_path, folder)
    assert cli.run(arguments) == 0
    whole = read_concept(arguments.output)
    assert whole.metadata["precision"] == "float32"
    flags = ("--precision", "bfloat16", "--max-rows", "1", "--gradient-checkpointing")
    assert cli.run(_arguments(model_path, folder, *flags)) == 0
    half = read_concept(arguments.output)
    assert half.metadata["precision"] == "bfloat16"
    assert half.concept_id != whole.concept_id


def test_masks_and_captions_are_used_and_reported(
    model_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:20] = 255
    Image.fromarray(mask).save(folder / "0.mask.png")
    (folder / "1.txt").write_text("a photo of <cat> in the morning\nred {}\n")
    arguments = _arguments(model_path, folder)
    assert cli.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "learned only where their masks are: 0.png" in printed
    assert "1.png: its captions (2) instead of the templates" in printed
    with_both = read_concept(arguments.output).concept_id
    (folder / "0.mask.png").unlink()
    assert cli.run(arguments) == 0
    without_mask = read_concept(arguments.output).concept_id
    (folder / "1.txt").unlink()
    assert cli.run(arguments) == 0
    assert len({with_both, without_mask, read_concept(arguments.output).concept_id}) == 3
    plain = capsys.readouterr().out.split("2 images")[-1]
    assert "learned only" not in plain and "its captions" not in plain


@pytest.mark.parametrize("changed", ["mask", "caption"])
def test_resume_with_another_mask_or_caption_is_refused(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", _Interrupted(2, KeyboardInterrupt()))
        cli.run(_arguments(model_path, folder))
    if changed == "mask":
        Image.fromarray(np.full((40, 40), 200, np.uint8)).save(folder / "0.mask.png")
    else:
        (folder / "0.txt").write_text("red {}")
    with pytest.raises(CheckpointError, match=f"the {changed}s differ; use the same"):
        cli.run(_arguments(model_path, folder, "--resume"))


def test_searched_initializer_is_reported_and_stored(
    model_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--initializer-token", "auto", "--initializer-candidates", "red cat, dog,cat"]
    arguments = _arguments(model_path, folder, *more, "--optimizer", "dti")
    assert cli.run(arguments) == 0
    metadata = read_concept(arguments.output).metadata
    losses = json.loads(metadata["initializer_losses"])
    assert set(losses) == {"red cat", "dog", "cat"}
    best = metadata["initializer_token"]
    assert losses[best] == min(losses.values()) and list(losses)[0] == best
    assert json.loads(metadata["initializer_candidates"]) == ["red cat", "dog", "cat"]
    assert float(metadata["initial_evaluation_loss"]) == pytest.approx(losses[best], abs=1e-5)
    assert (metadata["optimizer"], metadata["learning_rate"]) == ("dti", "0.04")
    words = ", ".join(f"{word} {loss:.4f}" for word, loss in losses.items())
    assert f"(with their evaluation losses): {words}\n" in capsys.readouterr().out


def test_run_that_was_rolled_back_says_so_and_goes_on(
    model_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = iter([1.0, 0.9, float("nan"), 0.8, 0.7])
    monkeypatch.setattr(Objective, "evaluate", lambda *_, **__: next(losses))
    assert cli.run(_arguments(model_path, folder)) == 0
    printed = capsys.readouterr()
    assert "back at step 2, learning rate halved (1 times so far)" in printed.err
    assert "1.0000 -> 0.7000 (step 6 of 6)" in printed.out
    assert "nan" not in printed.err


class _Interrupted:
    """`learn_together` as it is, until Ctrl-C comes while a step is under way."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error = after, error

    def __call__(self, *positional: Any, **named: Any) -> Iterator[tuple[LearnState, ...]]:
        for states in learn_together(*positional, **named):
            yield states
            if states[0].step == self.after:
                raise self.error


def test_interrupted_run_goes_on_to_the_same_result(
    model_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = _arguments(model_path, folder)
    assert cli.run(arguments) == 0
    expected = read_concept(arguments.output)
    arguments.output.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", _Interrupted(4, KeyboardInterrupt()))
        assert cli.run(arguments) == 130
    assert "after step 4" in capsys.readouterr().err
    assert not arguments.output.exists()
    with pytest.raises(CheckpointError, match="add --resume"):
        cli.run(arguments)
    assert cli.run(_arguments(model_path, folder, "--resume")) == 0
    assert read_concept(arguments.output).concept_id == expected.concept_id
    assert [path.name for path in arguments.output.parent.iterdir()] == ["cat.safetensors"]


@pytest.mark.parametrize("kind", [Diverged, NoGradient])
def test_run_that_cannot_go_on_says_so_and_keeps_its_last_good_vectors(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[LearningError]
) -> None:
    arguments = _arguments(model_path, folder)
    monkeypatch.setattr(learn_job, "learn_together", _Interrupted(3, kind("step 4: stuck")))
    with pytest.raises(kind, match="step 4: stuck; stopped after step 3; ") as caught:
        cli.run(arguments)
    checkpoint = arguments.output.with_name("cat.safetensors.checkpoint")
    assert checkpoint.is_file()
    assert f"delete {checkpoint} and start with a lower --learning-rate" in str(caught.value)
    assert "goes on" not in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="learning_rate is .*delete it"):
        cli.run(_arguments(model_path, folder, "--resume", "--learning-rate", "1e-4"))
    checkpoint.unlink()
    assert cli.run(_arguments(model_path, folder, "--learning-rate", "1e-4")) == 0


def test_sigterm_is_like_ctrl_c_with_its_own_exit_code(
    model_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unhandled(*_: object) -> None:
        raise AssertionError("the command does not handle SIGTERM")

    def learn_until_terminated(*positional: Any, **named: Any) -> Iterator[tuple[LearnState, ...]]:
        for states in learn_together(*positional, **named):
            yield states
            if states[0].step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, unhandled)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(learn_job, "learn_together", learn_until_terminated)
            assert cli.run(_arguments(model_path, folder)) == 143
        assert signal.getsignal(signal.SIGTERM) is unhandled
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "terminated after step 4" in capsys.readouterr().err
    arguments = _arguments(model_path, folder, "--resume")
    assert cli.run(arguments) == 0
    assert arguments.output.is_file()


def test_command_runs_in_a_thread_that_cannot_handle_signals(
    model_path: Path, folder: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cli.run, _arguments(model_path, folder)).result() == 0


def test_run_that_learned_nothing_says_so(
    model_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    warning = "<cat> is still its initializer"
    assert cli.run(_arguments(model_path, folder, "--learning-rate", "0.02")) == 0
    assert warning not in capsys.readouterr().err
    losses = iter([1.0, 1.5, 1.5, 1.5])
    monkeypatch.setattr(Objective, "evaluate", lambda *_, **__: next(losses))
    assert cli.run(_arguments(model_path, folder)) == 0
    assert warning in (err := capsys.readouterr().err)
    assert "lower --learning-rate" in err and "--steps" in err


def test_overwritten_output_is_said(
    model_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(model_path, folder)
    assert cli.run(arguments) == 0
    assert "overwritten" not in capsys.readouterr().err
    assert cli.run(arguments) == 0
    assert f"{arguments.output} exists and will be overwritten" in capsys.readouterr().err


def test_bar_shows_no_nan(
    model_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(_arguments(model_path, folder)) == 0
    err = capsys.readouterr().err
    assert "best=" in err and "nan" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="file names there are text")
def test_file_names_that_cannot_be_printed_are_escaped(
    model_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").rename(folder / "fuchs \u00fc.png")
    (folder / "bell\a\x1b[31m.txt").write_text("not an image")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(content[:-1] + b"?")
    output = os.fsdecode(os.fsencode(folder.parent) + b"/\xfe.safetensors")
    assert cli.run(_arguments(model_path, folder, "--output", output)) == 0
    assert Path(output).is_file()
    printed = capsys.readouterr().out
    assert "fuchs \u00fc.png" in printed
    assert r"\udcff.png" in printed
    assert r"skipped bell\x07\x1b[31m.txt" in printed
    assert r"\udcfe.safetensors" in printed
    assert all(character.isprintable() for character in printed.replace("\n", ""))


def test_resume_with_other_options_is_refused(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", _Interrupted(2, KeyboardInterrupt()))
        cli.run(_arguments(model_path, folder))
    with pytest.raises(CheckpointError, match="seed is 9, it was 0"):
        cli.run(_arguments(model_path, folder, "--resume", "--seed", "9"))


def test_checkpoints_and_previews_come_when_due(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--checkpoint-every", "4", "--preview-every", "3"]
    arguments = _arguments(model_path, folder, *more)
    written: list[int] = []
    monkeypatch.setattr(
        learn_word, "write_checkpoint", lambda path, state, identity: written.append(state.step)
    )
    assert cli.run(arguments) == 0
    assert written == [4]
    previews = sorted(arguments.output.parent.glob("*.png"))
    assert [p.name for p in previews] == [f"cat.step-0000{n}.png" for n in (0, 3, 6)]
    with Image.open(previews[0]) as preview:
        assert preview.size == (4 * 16, 16)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--initializer-candidates", "cat"], "initializer_token must be 'auto'"),
        (["--model", "/nowhere"], "no such folder"),
        (["--num-vectors", "1000000000"], "num_vectors=1000000000 .* at most"),
        (["--device", "abacus"], "cannot use the device abacus"),
        (["--device", "meta"], "cannot use the device meta"),
        (["--device", "hpu"], "cannot use the device hpu"),
        (["--device", ""], "cannot use the device ''"),
        (["--output", "/proc/x.safetensors"], "cannot write to /proc"),
        (["--output", "/"], "is a folder"),
        (["--resume"], "start without --resume"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    model_path: Path, folder: Path, more: list[str], message: str
) -> None:
    with pytest.raises(OneWordError, match=message) as caught:
        cli.run(_arguments(model_path, folder, *more))
    assert "\n" not in str(caught.value)


def test_candidates_must_be_words(
    model_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _arguments(model_path, folder, "--initializer-candidates", " ,")
    assert "' ,' has no candidate; give words" in capsys.readouterr().err


def test_placeholder_that_prompts_cannot_hold_is_refused_before_learning(
    model_path: Path, folder: Path
) -> None:
    with pytest.raises(ConceptUnreadable, match="white space"):
        cli.run(_arguments(model_path, folder, "--placeholder-token", "my cat"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_previews_are_the_images_that_diffusers_draws(model_path: Path) -> None:
    vectors = 0.1 * torch.randn((1, 24), generator=torch.Generator().manual_seed(0))
    concept = Concept(placeholder_token="<cat>", learned_embeddings=vectors.numpy())
    (drawn,) = sample_images(
        load_model(model_path), [concept], ["a photo of <cat>"], size=16, seed=5
    )
    pipeline: Any = StableDiffusionPipeline.from_pretrained(str(model_path), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion({"<cat>": vectors})
    expected = pipeline(
        "a photo of <cat>",
        num_inference_steps=20,
        guidance_scale=4.0,
        width=16,
        height=16,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    # Rounding to 8 bits may fall to either side of a half.
    difference = np.asarray(drawn).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 1


def test_previews_do_not_clip_latents_where_the_config_does_not_say(model_path: Path) -> None:
    vectors = 0.1 * torch.randn((1, 24), generator=torch.Generator().manual_seed(0))
    concept = Concept(placeholder_token="<cat>", learned_embeddings=vectors.numpy())
    model = load_model(model_path)
    silent = {k: v for k, v in model.scheduler_config.items() if k != "clip_sample"}
    drawn = [
        sample_images(m, [concept], ["a photo of <cat>"], size=16)[0].tobytes()
        for m in (model, dataclasses.replace(model, scheduler_config=silent))
    ]
    assert drawn[0] == drawn[1]
