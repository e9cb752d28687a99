"""The numbers of a run as TensorBoard shows them: one event file, without a number twice.

Events are records (TFRecord) of TensorBoard's own protobuf messages. They are written here and not
by its `SummaryWriter`, because that writes in a thread of its own, where a full disk would end it.
"""

import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.files import write_atomically
from trainer.errors import LearningError
from trainer.options import LearnOptions
from trainer.run import LearnState

_PATTERN = "events.out.tfevents.*.oneword"  # TensorBoard reads what has `tfevents` in its name
_VERSION = "brain.Event:2"  # of the format, as TensorBoard's own writers put it first


class EventLog:
    """An event file that grows; what could not be written waits in memory for the next `flush`."""

    def __init__(self, path: Path, kept: Sequence[bytes]) -> None:
        self._path = path
        self._size = 0  # bytes of the file that are whole records
        self._waiting = b"".join(map(_framed, kept))
        self._is_new = True

    @classmethod
    def open(cls, folder: Path, *, resume_from: int | None) -> "EventLog":
        """A new file of a folder; of a run that goes on after a step it holds all up to that step,
        and takes the place of the file that has them.

        Raises `LearningError` if TensorBoard is not installed, or for a folder that holds another
        run.
        """
        _messages()  # finds out now that it is missing
        earlier = sorted(folder.glob(_PATTERN))
        if earlier and resume_from is None:
            raise LearningError(
                f"{folder} holds the numbers of another run ({earlier[-1].name}); name another "
                "folder for --tensorboard, or delete it"
            )
        kept = _until(earlier[-1], resume_from) if earlier and resume_from is not None else []
        now = time.time()
        log = cls(
            folder / f"events.out.tfevents.{int(now * 1e6):017d}.oneword",
            kept or [_event(wall_time=now, file_version=_VERSION)],
        )
        log.flush()
        for path in earlier:
            path.unlink()
        return log

    def add(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, bytes]) -> None:
        """Numbers, and pictures as PNG, of one step."""
        values = [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]
        values += [
            {"tag": tag, "image": {"encoded_image_string": png}} for tag, png in pictures.items()
        ]
        event = _event(wall_time=time.time(), step=step, summary={"value": values})
        self._waiting += _framed(event)

    def flush(self) -> None:
        """Write what waits, whole: what a failed write has left is cut off before."""
        if self._is_new:
            write_atomically(self._path, self._waiting)
        else:
            with self._path.open("r+b") as file:
                file.truncate(self._size)
                file.seek(self._size)
                file.write(self._waiting)
        self._is_new = False
        self._size += len(self._waiting)
        self._waiting = b""


def scalars_of(state: LearnState, options: LearnOptions, dims: Sequence[int]) -> dict[str, float]:
    """What is worth a curve in the state after a step; `dims` are the widths for each encoder."""
    found: dict[str, float] = {}
    if not math.isnan(state.loss):
        rate = options.rate_at(state.step - 1) * 0.5**state.rollbacks
        found |= {"loss": state.loss, "gradient_norm": state.grad_norm, "learning_rate": rate}
    if state.evaluation_loss is not None:
        found["evaluation_loss"] = state.evaluation_loss
    for place, part in enumerate(state.vectors.split(list(dims), dim=1)):
        name = "vector_norm" if place == 0 else f"vector_norm_{place + 1}"
        found[name] = part.norm(dim=1).mean().item()
    return found


def _until(path: Path, step: int) -> list[bytes]:
    """The events of a file up to a step; what a kill has left of a record at its end is none."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.tensorflow_stub import errors

    loader: Any = RawEventFileLoader(str(path))
    kept: list[bytes] = []
    try:
        for serialized in loader.Load():
            if _messages().Event.FromString(serialized).step <= step:
                kept.append(serialized)
    except errors.DataLossError:  # nothing behind a damaged record can be read
        pass
    return kept


def _event(**content: Any) -> bytes:
    return _messages().Event(**content).SerializeToString()


def _framed(event: bytes) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer: Any = RecordWriter(buffer)
    writer.write(event)
    return buffer.getvalue()


def _messages() -> Any:
    """TensorBoard's protobuf messages."""
    try:
        from tensorboard.compat.proto import event_pb2
    except ModuleNotFoundError as error:
        raise LearningError(
            "--tensorboard needs the package tensorboard; install it with: "
            "pip install 'oneword[tensorboard]'"
        ) from error
    return event_pb2
