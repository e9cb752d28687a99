"""What is judged: concept files, their labels, and their training images."""

from pathlib import Path

import numpy as np
import pytest

from engine.errors import InvalidRequest
from tests import evaluation_setup
from tests.evaluation_setup import SIZE, make_concept, write_file
from trainer.errors import NoUsableImages
from trainer.evaluation_errors import EvaluationError
from trainer.evaluation_subjects import GREY, read_subjects, read_training_pictures

# Fixtures.
folder = evaluation_setup.folder


def test_labels_are_names_of_files_or_given(folder: Path, tmp_path: Path) -> None:
    one = write_file(tmp_path, make_concept())
    other = write_file(tmp_path, make_concept(seed=1), "y.safetensors")
    (tmp_path / "b").mkdir()
    twin = write_file(tmp_path / "b", make_concept(seed=2))
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
    one = str(write_file(tmp_path, make_concept()))
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
