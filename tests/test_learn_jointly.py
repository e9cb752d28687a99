"""`oneword learn --together` as a user meets it: words in one run, with images of all of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.concepts import read_concept
from tests.learning_setup import image_folder, learn_arguments, make_tiny
from trainer import cli, learn_joint
from trainer.errors import CheckpointError, LearningError
from trainer.images import read_images
from trainer.joint import JointWord, joint_concepts, learn_jointly
from trainer.model import load_model
from trainer.options import LearnOptions

SENTENCE = "a photo of {1} in the {0}"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("images")
    names = ("cat", "owl", "both")
    return [image_folder(parent / name, seed=seed) for seed, name in enumerate(names)]


def _words(folders: list[Path]) -> list[str]:
    cat, owl, _ = folders
    return ["--concept", f"<cat>={cat}", "--concept", f"<owl>={owl}"]


def _together(folders: list[Path]) -> list[str]:
    return [*_words(folders), "--together", str(folders[2]), "--sentence", SENTENCE]


def _vectors(folder: Path) -> list[Any]:
    return [
        read_concept(folder / f"{name}.safetensors").learned_embeddings for name in ("cat", "owl")
    ]


class Killed(BaseException):
    """As kill -9: nothing is attended to."""


def _until(step: int, error: BaseException) -> Any:
    def loop(*positional: Any, **named: Any) -> Any:
        for state in learn_jointly(*positional, **named):
            yield state
            if state.step == step:
                raise error

    return loop


def test_the_command_learns_what_a_joint_run_learns(
    model_path: Path, folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*_together(folders), "--num-vectors", "2", "--preview-every", "6"]
    assert cli.run(learn_arguments(model_path, tmp_path, *more)) == 0
    assert "together: " in (out := capsys.readouterr().out)
    assert "cat.safetensors" in out and "owl.safetensors" in out

    model = load_model(str(model_path))
    words = [
        JointWord(
            placeholder_token=f"<{folder.name}>",
            images=read_images(folder, size=16, placeholder_token=None),
            num_vectors=2,
        )
        for folder in folders[:2]
    ]
    options = LearnOptions(steps=6, batch_size=2, eval_every=2)
    both = read_images(folders[2], size=16, placeholder_token=None)
    *_, state = learn_jointly(model, words, both, options, sentences=[SENTENCE])
    expected = [c.learned_embeddings for c in joint_concepts(model, words, options, state)]
    np.testing.assert_array_equal(_vectors(tmp_path), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cat.safetensors",
        "owl.safetensors",
        "together.step-00000.png",
        "together.step-00006.png",
    ]
    drawn = np.asarray(Image.open(tmp_path / "together.step-00006.png"))
    assert drawn.shape == (16, 16, 3) and drawn.std() > 0


def test_a_killed_run_goes_on_to_the_same_bits(
    model_path: Path, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(learn_arguments(model_path, tmp_path / "whole", *_together(folders))) == 0
    often = [*_together(folders), "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(learn_joint, "learn_jointly", _until(3, Killed()))
        with pytest.raises(Killed):
            cli.run(learn_arguments(model_path, tmp_path / "parts", *often))
    with pytest.raises(CheckpointError, match="unfinished run; add --resume"):
        cli.run(learn_arguments(model_path, tmp_path / "parts", *often))
    assert cli.run(learn_arguments(model_path, tmp_path / "parts", *often, "--resume")) == 0
    np.testing.assert_array_equal(_vectors(tmp_path / "parts"), _vectors(tmp_path / "whole"))
    assert not (tmp_path / "parts" / "together.checkpoint").exists()


def test_interrupted_run_is_saved_and_another_one_is_not_taken_for_it(
    model_path: Path,
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(learn_joint, "learn_jointly", _until(3, KeyboardInterrupt()))
        assert cli.run(learn_arguments(model_path, tmp_path, *_together(folders))) == 130
    assert "after step 3; state and best vectors are in" in capsys.readouterr().err
    other = [*_together(folders)[:-1], "a photo of {0} on the {1}", "--resume"]
    with pytest.raises(CheckpointError, match="sentences is .* it was"):
        cli.run(learn_arguments(model_path, tmp_path, *other))
    cat, owl, both = folders
    swapped = ["--concept", f"<cat>={owl}", "--concept", f"<owl>={cat}", "--together", str(both)]
    swapped += ["--sentence", SENTENCE, "--resume"]
    with pytest.raises(CheckpointError, match="the images differ"):
        cli.run(learn_arguments(model_path, tmp_path, *swapped))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prefer", "faithful"], "--prefer is for words that are learned alone"),
        (["--tensorboard", "events"], "--tensorboard is for words that are learned alone"),
        (["--keep-checkpoints", "kept"], "--keep-checkpoints is for words that are learned alone"),
        (["--progressive", "--num-vectors", "2"], "progressive is for one word alone"),
        (["--initializer-token", "auto"], "does not search for an initializer"),
        (["--sentence", "only {0}"], "must name each word once"),
        (["--preset", "human-captions"], "needs captions for every image"),
    ],
)
def test_what_does_not_go_together_is_refused(
    model_path: Path, folders: list[Path], tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(LearningError, match=message):
        cli.run(learn_arguments(model_path, tmp_path / "out", *_together(folders), *flags))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_half_of_what_a_joint_run_needs_is_refused(
    model_path: Path, folders: list[Path], tmp_path: Path
) -> None:
    cat, _, both = folders
    with pytest.raises(LearningError, match="name each with --concept"):
        alone = [cat, "--placeholder-token", "<cat>", "--together", both]
        cli.run(learn_arguments(model_path, tmp_path, *alone))
    with pytest.raises(LearningError, match="--sentence describes the images of --together"):
        words = [*_words(folders), "--sentence", SENTENCE]
        cli.run(learn_arguments(model_path, tmp_path, *words))
    with pytest.raises(LearningError, match="at least 2 words"):
        one = ["--concept", f"<cat>={cat}", "--together", both]
        cli.run(learn_arguments(model_path, tmp_path, *one))
