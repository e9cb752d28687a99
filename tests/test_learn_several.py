"""`oneword learn --concept` as a user meets it: several words, each with files of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.concepts import read_concept
from engine.errors import OneWordError
from tests.learning_setup import image_folder, learn_arguments, make_tiny
from trainer import cli, learn_job
from trainer.errors import CheckpointError, Diverged
from trainer.learn_tasks import tasks_of
from trainer.learning import learn_together


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("images")
    return [image_folder(parent / name, seed=seed) for seed, name in enumerate(("cat", "owl"))]


def _words(folders: Sequence[Path]) -> list[str]:
    given = zip(("<cat>", "<owl>"), folders, strict=False)
    return [word for token, folder in given for word in ("--concept", f"{token}={folder}")]


def _vectors(path: Path) -> Any:
    return read_concept(path).learned_embeddings


class Killed(BaseException):
    """As kill -9: nothing is attended to."""


def _until(step: int, error: BaseException) -> Any:
    def loop(*positional: Any, **named: Any) -> Any:
        for states in learn_together(*positional, **named):
            yield states
            if states[-1].step == step:
                raise error

    return loop


def test_each_word_becomes_what_it_would_become_alone(
    model_path: Path,
    folders: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [*_words(folders), "--keep-checkpoints", tmp_path / "kept"]
    more += ["--tensorboard", tmp_path / "tb", "--preview-every", "6"]
    assert cli.run(learn_arguments(model_path, tmp_path / "words", *more)) == 0
    printed = capsys.readouterr()
    for folder in folders:
        name, token = folder.name, f"<{folder.name}>"
        alone = tmp_path / "alone" / f"{name}.safetensors"
        arguments = learn_arguments(model_path, alone, folder, "--placeholder-token", token)
        assert cli.run(arguments) == 0
        concept = read_concept(tmp_path / "words" / f"{name}.safetensors")
        assert concept.placeholder_token == token
        # Other sums of float32 in the matrix products, and six steps of at most 0.003.
        np.testing.assert_allclose(concept.learned_embeddings, _vectors(alone), rtol=0, atol=1e-4)
        assert f"{token}: evaluation loss" in printed.out
        assert f"{token}: 100%" in printed.err
        assert len(list((tmp_path / "kept" / name).iterdir())) == 4
        assert len(list((tmp_path / "tb" / name).iterdir())) == 1
    assert sorted(path.name for path in (tmp_path / "words").iterdir()) == [
        "cat.safetensors",
        "cat.step-00000.png",
        "cat.step-00006.png",
        "owl.safetensors",
        "owl.step-00000.png",
        "owl.step-00006.png",
    ]


@pytest.mark.parametrize("lost", [None, "owl"])
def test_killed_run_goes_on_to_the_same_words(
    model_path: Path,
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str | None,
) -> None:
    """Also where the kill came between the first checkpoints of two words."""
    more = [*_words(folders), "--checkpoint-every", "3"]
    assert cli.run(learn_arguments(model_path, tmp_path / "whole", *more)) == 0
    more += ["--tensorboard", str(tmp_path / "tb")]
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", _until(4, Killed()))
        with pytest.raises(Killed):
            cli.run(learn_arguments(model_path, tmp_path / "words", *more))
    if lost:
        (tmp_path / "words" / f"{lost}.safetensors.checkpoint").unlink()
    with pytest.raises(CheckpointError, match="add --resume"):
        cli.run(learn_arguments(model_path, tmp_path / "words", *more))
    assert cli.run(learn_arguments(model_path, tmp_path / "words", *more, "--resume")) == 0
    names = sorted(path.name for path in (tmp_path / "words").iterdir())
    assert names == ["cat.safetensors", "owl.safetensors"]
    for name in names:
        found, expected = (_vectors(tmp_path / folder / name) for folder in ("words", "whole"))
        # A pass of other rows sums in another order, as above.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if lost else 0)


def test_interrupt_saves_every_word(
    model_path: Path,
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(learn_job, "learn_together", _until(2, KeyboardInterrupt()))
    assert cli.run(learn_arguments(model_path, tmp_path, *_words(folders))) == 130
    err = capsys.readouterr().err
    assert "interrupted <cat>: after step 2; " in err and "; <owl>: after step 2; " in err
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cat.safetensors.checkpoint", "owl.safetensors.checkpoint"]


def test_others_go_on_without_the_word_that_cannot(
    model_path: Path, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", _until(3, Diverged("concept 2 of 2: step 4")))
        with pytest.raises(Diverged, match="<owl>: after step 3; .*without that --concept"):
            cli.run(learn_arguments(model_path, tmp_path, *_words(folders)))
    arguments = learn_arguments(model_path, tmp_path, *_words(folders[:1]), "--resume")
    assert cli.run(arguments) == 0
    assert (tmp_path / "cat.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to learn: give IMAGES and --placeholder-token"),
        (["{0}"], "nothing to learn"),
        (["{0}", "--placeholder-token", "<a>", "--concept", "<b>={1}"], "leave IMAGES and"),
        (["--concept", "<a>={0}", "--concept", "<a>={1}"], "<a> is given 2 times"),
        (["--concept", "<a>={0}", "--concept", "A={1}"], "<a> and --concept A would both be"),
        (["--concept", "<a/b>={0}", "--concept", "a_b={1}"], r"both be written to a_b\.safe"),
        (["--concept", "<a>={0}/none"], "no such folder .*none"),
        (["--concept", "{0}"], "does not say token and images"),
        (["--concept", "<a>="], "does not say token and images"),
        (["--concept", "a b={0}"], "white space"),
        (["--concept", "<a>={0}", "--output", "{0}/0.png"], "is a file; with --concept name a"),
    ],
)
def test_words_that_cannot_be_learned_together_are_refused(
    model_path: Path, folders: list[Path], tmp_path: Path, more: list[str], message: str
) -> None:
    words = [word.format(*folders) for word in more]
    with pytest.raises(OneWordError, match=message) as caught:
        cli.run(learn_arguments(model_path, tmp_path / "out", *words))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", ["<../../x>", "<.hidden>", "</etc/passwd>", "<\u00fc" + "x" * 60])
def test_token_names_a_file_of_the_folder(
    model_path: Path, folders: list[Path], tmp_path: Path, token: str
) -> None:
    arguments = learn_arguments(model_path, tmp_path, "--concept", f"{token}={folders[0]}")
    (task,) = tasks_of(arguments)
    assert task.output.parent == tmp_path
    assert not task.output.name.startswith(".")
    assert len(task.checkpoint.name.encode()) < 255
