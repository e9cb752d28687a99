"""A denoising task as a message and back: what crosses when an image begins."""

from collections.abc import Iterator

import numpy as np

from engine.guidance import GuidedCalls
from engine.planner import DenoisingTask, TextRows
from engine.samplers import COLUMNS, NUM_COLUMNS, StepCoefficients, Trajectory
from engine.worker.wire import Array, Message, WireError

_ARRAYS_OF_TEXT = 3


def task_to_message(task: DenoisingTask) -> Message:
    """Coefficients go as float64, so that no image changes by the way."""
    body = {
        "seed": task.seed,
        "num_images": task.num_images,
        "width": task.width,
        "height": task.height,
        "init_sigma": task.trajectory.init_sigma,
        "weights": task.weights,
        "guided_calls": [task.guided_calls.first, task.guided_calls.end],
        "zero_negative": task.zero_negative,
        "rows_of_encoders": [len(texts) for texts in task.texts],
        "has_init_image": task.init_image is not None,
    }
    arrays = [_table(task.trajectory)]
    for texts in task.texts:
        for text in texts:
            arrays += [text.inputs_embeds, text.eos_index, text.weights]
    if task.init_image is not None:
        arrays.append(task.init_image)
    return Message(body, arrays)


def task_from_message(message: Message) -> DenoisingTask:
    """Raises `WireError` for a message that is no task."""
    body, arrays = message.body, iter(message.arrays)
    try:
        task = DenoisingTask(
            seed=int(body["seed"]),
            num_images=int(body["num_images"]),
            width=int(body["width"]),
            height=int(body["height"]),
            trajectory=_trajectory(next(arrays), float(body["init_sigma"])),
            texts=tuple(
                tuple(_text(arrays) for _ in range(int(rows))) for rows in body["rows_of_encoders"]
            ),
            weights=tuple(float(weight) for weight in body["weights"]),
            guided_calls=GuidedCalls(*(int(call) for call in body["guided_calls"])),
            zero_negative=bool(body["zero_negative"]),
            init_image=next(arrays) if body["has_init_image"] else None,
        )
    except (KeyError, TypeError, ValueError, IndexError, StopIteration, RuntimeError) as error:
        raise WireError(f"a task cannot be read: {error!r}") from error
    if left := len(list(arrays)):
        raise WireError(f"a task has {left} arrays too many")
    return task


def _text(arrays: Iterator[Array]) -> TextRows:
    inputs_embeds, eos_index, weights = (next(arrays) for _ in range(_ARRAYS_OF_TEXT))
    return TextRows(inputs_embeds=inputs_embeds, eos_index=eos_index, weights=weights)


def _table(trajectory: Trajectory) -> Array:
    rows = trajectory.rows
    if len({len(row.b) for row in rows}) != 1:
        raise WireError("the steps of a trajectory must have one number of history weights")
    values = [[*(getattr(row, name) for name in COLUMNS), *row.b] for row in rows]
    return np.array(values, np.float64)


def _trajectory(table: Array, init_sigma: float) -> Trajectory:
    rows = tuple(
        StepCoefficients(
            **dict(zip(COLUMNS, values[:NUM_COLUMNS], strict=True)), b=tuple(values[NUM_COLUMNS:])
        )
        for values in table.tolist()
    )
    return Trajectory(rows=rows, init_sigma=init_sigma)
