"""What TensorBoard shows of a run, read with TensorBoard's own reader."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2

from tests import learning_setup
from tests.learning_setup import learn_arguments
from trainer import cli, learn_job
from trainer.errors import LearningError
from trainer.learning import learn_together
from trainer.objective import Objective
from trainer.options import LearnOptions
from trainer.run import LearnState
from trainer.scalars import EventLog, scalars_of

# Fixtures.
model_path, model, folder, states = (
    learning_setup.model_path,
    learning_setup.model,
    learning_setup.folder,
    learning_setup.states,
)


class Killed(BaseException):
    """As kill -9: nothing is attended to."""


def _arguments(model_path: Path, folder: Path, tmp_path: Path, *more: str) -> Any:
    return learn_arguments(
        model_path,
        tmp_path / "out" / "cat.safetensors",
        *(folder, "--placeholder-token", "<cat>", "--tensorboard", tmp_path / "tb", *more),
    )


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By TensorBoard's accumulator, and none of them twice in the files themselves."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags: Any = accumulator.Tags()["scalars"]
    found = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}
    raw: list[tuple[str, int]] = []
    messages: Any = event_pb2
    for path in folder.iterdir():
        loader: Any = RawEventFileLoader(str(path))
        for event in map(messages.Event.FromString, loader.Load()):
            raw += [(value.tag, event.step) for value in event.summary.value]
    assert len(raw) == len(set(raw))
    assert len(raw) >= sum(map(len, found.values()))
    return found


def _expected(states: list[LearnState]) -> dict[str, list[tuple[int, float]]]:
    options = LearnOptions(steps=6, batch_size=2, eval_every=2)
    moved = states[1:]
    return {
        "loss": [(s.step, s.loss) for s in moved],
        "gradient_norm": [(s.step, s.grad_norm) for s in moved],
        "learning_rate": [(s.step, options.rate_at(s.step - 1)) for s in moved],
        "evaluation_loss": [
            (s.step, s.evaluation_loss) for s in states if s.evaluation_loss is not None
        ],
        "vector_norm": [(s.step, s.vectors.norm().item()) for s in states],
    }


def _check(folder: Path, states: list[LearnState]) -> None:
    found, expected = _scalars(folder), _expected(states)
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values]
        # Stored as float32.
        assert [v for _, v in found[tag]] == pytest.approx([v for _, v in values], rel=1e-6)


def test_tensorboard_reads_the_numbers_of_the_run(
    model_path: Path, folder: Path, states: list[LearnState], tmp_path: Path
) -> None:
    assert cli.run(_arguments(model_path, folder, tmp_path)) == 0
    _check(tmp_path / "tb", states)


def test_resumed_run_writes_no_number_twice(
    model_path: Path,
    folder: Path,
    states: list[LearnState],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def until_killed(*positional: Any, **named: Any) -> Any:
        for states in learn_together(*positional, **named):
            yield states
            if states[0].step == 5:
                raise Killed

    more = ["--checkpoint-every", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(learn_job, "learn_together", until_killed)
        with pytest.raises(Killed):
            cli.run(_arguments(model_path, folder, tmp_path, *more))
    (path,) = (tmp_path / "tb").iterdir()
    assert _scalars(tmp_path / "tb")["loss"][-1][0] == 5
    path.write_bytes(path.read_bytes()[:-3])  # killed within a record
    assert cli.run(_arguments(model_path, folder, tmp_path, *more, "--resume")) == 0
    _check(tmp_path / "tb", states)


def test_rolled_back_steps_are_not_there_twice(
    model_path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 0.9, math.nan, 0.8, 0.7])
    monkeypatch.setattr(Objective, "evaluate", lambda *_, **__: next(losses))
    assert cli.run(_arguments(model_path, folder, tmp_path)) == 0
    found = _scalars(tmp_path / "tb")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [round(value, 4) for _, value in found["evaluation_loss"]] == [1.0, 0.9, 0.8, 0.7]
    options = LearnOptions(steps=6, batch_size=2, eval_every=2)
    rates = [value for _, value in found["learning_rate"]]
    assert rates[2] == pytest.approx(options.rate_at(2) / 2, rel=1e-6)  # float32


def test_previews_are_pictures(model_path: Path, folder: Path, tmp_path: Path) -> None:
    assert cli.run(_arguments(model_path, folder, tmp_path, "--preview-every", "6")) == 0
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    pictures = accumulator.Images("preview")
    assert [picture.step for picture in pictures] == [0, 6]
    preview = tmp_path / "out" / "cat.step-00006.png"
    assert pictures[1].encoded_image_string == preview.read_bytes()


def test_numbers_of_another_run_are_not_mixed_in(
    model_path: Path, folder: Path, tmp_path: Path
) -> None:
    EventLog.open(tmp_path / "tb", resume_from=None)
    with pytest.raises(LearningError, match="numbers of another run .*name another folder"):
        cli.run(_arguments(model_path, folder, tmp_path))


def test_missing_tensorboard_is_said_before_learning(
    model_path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    monkeypatch.delitem(sys.modules, "tensorboard.compat.proto.event_pb2", raising=False)
    with pytest.raises(LearningError, match=r"pip install 'oneword\[tensorboard\]'"):
        cli.run(_arguments(model_path, folder, tmp_path))


def test_what_a_full_disk_has_refused_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog.open(tmp_path, resume_from=None)
    (path,) = tmp_path.iterdir()
    log.add(1, {"loss": 1.0}, {})
    log.flush()
    whole = path.read_bytes()

    class Full:
        """A file of which half a write fits onto the disk."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: Full(opened(self, mode)))
        log.add(2, {"loss": 2.0}, {})
        with pytest.raises(OSError, match="No space"):
            log.flush()
    assert len(path.read_bytes()) > len(whole)
    log.add(3, {"loss": 3.0}, {})
    log.flush()
    assert _scalars(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_vectors_of_two_encoders_have_a_length_each(states: list[LearnState]) -> None:
    vectors = states[-1].vectors
    found = scalars_of(states[-1], LearnOptions(steps=6), (10, 14))
    assert found["vector_norm"] == pytest.approx(vectors[:, :10].norm().item())
    assert found["vector_norm_2"] == pytest.approx(vectors[:, 10:].norm().item())
