"""A full disk: said before learning, borne while learning, and at the end no vectors are lost."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine import files
from engine.concepts import read_concept
from tests import learning_setup
from tests.learning_setup import learn_arguments
from trainer import cli, learn_job
from trainer.disk import Need, PatientWrites, check_room, write_somewhere
from trainer.errors import LearningError
from trainer.learning import learn_together
from trainer.run import LearnState

# Fixtures.
model_path, model, folder, states = (
    learning_setup.model_path,
    learning_setup.model,
    learning_setup.folder,
    learning_setup.states,
)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class FullDisk:
    """No room below a folder, from one step of the run to another."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.is_full = folder, False
        write = files._write_and_rename
        patch.setattr(files, "_write_and_rename", lambda p, c: self.write(write, p, c))

    def write(self, write: Any, path: Path, content: bytes) -> None:
        if self.is_full and path.is_relative_to(self.folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "temporary")
        write(path, content)

    def between(self, first: int, last: int, raises: BaseException | None = None) -> Any:
        """`learn_together` during which the disk is full after these steps."""

        def loop(*positional: Any, **named: Any) -> Any:
            for states in learn_together(*positional, **named):
                self.is_full = first <= states[0].step <= last
                yield states
                if raises and states[0].step == last:
                    raise raises

        return loop


def _arguments(model: Path, folder: Path, output: Path, *more: str | Path) -> Any:
    return learn_arguments(model, output, folder, "--placeholder-token", "<cat>", *more)


# --- before learning ---


def test_room_is_counted_for_each_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 3000))
    (tmp_path / "a").mkdir()
    one = Need(what="one thing", folder=tmp_path, num_bytes=2000)
    other = Need(what="another", folder=tmp_path / "a", num_bytes=1001)
    check_room([one])
    check_room([other])
    with pytest.raises(
        LearningError, match=r"2\.9 KiB are free, .* 2\.9 KiB \(one thing 2\.0 KiB, another 1\.0"
    ):
        check_room([one, other])


def test_too_little_room_is_said_before_the_first_step(
    model_path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10_000))
    monkeypatch.setattr(learn_job, "learn_together", lambda *_, **__: pytest.fail("it learned"))
    with pytest.raises(LearningError, match=r"9\.8 KiB are free, .*checkpoints.*make room, or"):
        cli.run(_arguments(model_path, folder, tmp_path / "cat.safetensors"))


def test_what_is_counted_is_enough(model_path: Path, folder: Path, tmp_path: Path) -> None:
    """Vectors of 10 x 24 floats, evaluated after each step: what is counted is what comes."""
    more: list[str | Path] = ["--num-vectors", "10", "--eval-every", "1", "--checkpoint-every", "6"]
    more += ["--keep-checkpoints", tmp_path / "k"]
    arguments = _arguments(
        model_path,
        folder,
        tmp_path / "cat.safetensors",
        *more,
        "--keep-checkpoints",
        tmp_path / "k",
    )
    sizes: dict[str, int] = {}
    counted: list[Need] = []

    def note(needs: Any) -> None:
        counted.extend(needs)

    def loop(*positional: Any, **named: Any) -> Any:
        yield from learn_together(*positional, **named)
        sizes.update({path.name: path.stat().st_size for path in tmp_path.glob("cat*")})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn_job, "check_room", note)
        patch.setattr(learn_job, "learn_together", loop)
        assert cli.run(arguments) == 0
    checkpoint, concept, kept = (need.num_bytes for need in counted)
    assert 2 * sizes["cat.safetensors.checkpoint"] <= checkpoint
    assert checkpoint <= 3 * 2 * sizes["cat.safetensors.checkpoint"]
    assert arguments.output.stat().st_size <= concept
    assert sum(path.stat().st_size for path in (tmp_path / "k").iterdir()) <= kept


# --- while learning ---


def test_run_goes_on_while_the_disk_is_full_and_writes_again(
    model_path: Path,
    folder: Path,
    states: list[LearnState],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out" / "cat.safetensors"
    disk = FullDisk(output.parent, monkeypatch)
    monkeypatch.setattr(learn_job, "learn_together", disk.between(2, 3))
    more = ["--checkpoint-every", "1", "--preview-every", "1"]
    assert cli.run(_arguments(model_path, folder, output, *more)) == 0
    concept = read_concept(output)
    np.testing.assert_array_equal(concept.learned_embeddings, states[-1].best_vectors.numpy())
    err = capsys.readouterr().err
    failed = f"cannot write the checkpoint {output}.checkpoint: No space left on device; learning"
    assert err.count(failed) == 1
    assert err.count(f"the checkpoint {output}.checkpoint could be written again") == 1
    assert err.count(f"cannot write previews in {output.parent}") == 1
    assert not (output.parent / "cat.step-00002.png").exists()
    assert (output.parent / "cat.step-00004.png").exists()


def test_failure_is_said_again_after_it_worked(capsys: pytest.CaptureFixture[str]) -> None:
    writes = PatientWrites()

    def fail() -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    made = [writes.attempt("it", write) for write in (fail, fail, int, fail)]
    assert made == [False, False, True, False]
    assert capsys.readouterr().err.count("cannot write it: Disk quota exceeded") == 2


# --- at the end ---


def test_concept_that_finds_no_room_is_written_elsewhere(
    model_path: Path,
    folder: Path,
    states: list[LearnState],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out" / "cat.safetensors"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(elsewhere))
    disk = FullDisk(output.parent, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", disk.between(5, 6))
        with pytest.raises(LearningError, match="No space left on device; the concept is in") as e:
            cli.run(_arguments(model_path, folder, output, "--checkpoint-every", "4"))
    (rescued,) = elsewhere.glob("*/cat.safetensors")
    assert str(rescued) in str(e.value) and "--resume goes on from it" in str(e.value)
    assert rescued.parent.stat().st_mode & 0o77 == 0
    concept = read_concept(rescued)
    np.testing.assert_array_equal(concept.learned_embeddings, states[-1].best_vectors.numpy())
    disk.is_full = False
    assert cli.run(_arguments(model_path, folder, output, "--resume")) == 0
    assert read_concept(output).concept_id == concept.concept_id


def test_checkpoint_of_an_interrupted_run_is_written_elsewhere(
    model_path: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out" / "cat.safetensors"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(elsewhere))
    disk = FullDisk(output.parent, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", disk.between(3, 4, KeyboardInterrupt()))
        assert cli.run(_arguments(model_path, folder, output)) == 130
    (rescued,) = elsewhere.glob("*/cat.safetensors.checkpoint")
    err = capsys.readouterr().err
    assert "interrupted after step 4; " in err and f"are in {rescued}; move it there" in err
    disk.is_full = False
    rescued.rename(output.with_name("cat.safetensors.checkpoint"))
    assert cli.run(_arguments(model_path, folder, output, "--resume")) == 0


def test_course_that_finds_no_room_can_be_written_later(
    model_path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, kept = tmp_path / "cat.safetensors", tmp_path / "kept"
    disk = FullDisk(kept, monkeypatch)
    more = ["--keep-checkpoints", kept]
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", disk.between(6, 6))
        with pytest.raises(LearningError, match=f"the concept is in {output}, but .*--resume"):
            cli.run(_arguments(model_path, folder, output, *more))
    assert output.is_file() and not list(kept.iterdir())
    disk.is_full = False
    assert cli.run(_arguments(model_path, folder, output, *more, "--resume")) == 0
    assert len(list(kept.iterdir())) == 4


def test_nowhere_to_write_raises_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "full", str(path))

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(OSError, match="full") as caught:
        write_somewhere(tmp_path / "x", fail)
    assert caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
