"""Trainings in the words of the API: pure functions without a server."""

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import InvalidRequest
from engine.training_folder import Status, TrainingState, UploadedImage
from engine.training_reports import Progress
from engine.training_spec import TrainingSpec
from engine.training_supervisor import Job
from protos.oneword.v1 import training_pb2

_OPTIONAL_FIELDS = ("steps", "batch_size", "learning_rate", "num_vectors", "seed")
_PROPERTIES: dict[int, str] = {
    training_pb2.LEARNABLE_PROPERTY_OBJECT: "object",
    training_pb2.LEARNABLE_PROPERTY_STYLE: "style",
}
_STATES: dict[Status, training_pb2.TrainingState.ValueType] = {
    "queued": training_pb2.TRAINING_STATE_QUEUED,
    "running": training_pb2.TRAINING_STATE_RUNNING,
    "cancelling": training_pb2.TRAINING_STATE_CANCELLING,
    "succeeded": training_pb2.TRAINING_STATE_SUCCEEDED,
    "failed": training_pb2.TRAINING_STATE_FAILED,
    "cancelled": training_pb2.TRAINING_STATE_CANCELLED,
}


def spec_from_proto(message: training_pb2.TrainingSpec) -> TrainingSpec:
    """Read a spec; what is absent stays absent. Ranges are checked later, by `check_spec`."""
    given = message.options
    options: dict[str, Any] = {
        name: getattr(given, name) for name in _OPTIONAL_FIELDS if given.HasField(name)
    }
    if given.initializer_token:
        options["initializer_token"] = given.initializer_token
    if given.learnable_property:
        options["learnable_property"] = _property(given.learnable_property)
    return TrainingSpec(
        placeholder_token=message.placeholder_token,
        options=options,
        overwrite=message.overwrite,
        request_id=message.request_id,
        preview_every_steps=message.preview_every_steps,
    )


def _property(value: int) -> str:
    if value not in _PROPERTIES:
        names = ", ".join(training_pb2.LearnableProperty.keys()[1:])
        raise InvalidRequest(
            f"unknown learnable_property {value}; known: {names}",
            field="options.learnable_property",
        )
    return _PROPERTIES[value]


def spec_to_proto(spec: TrainingSpec) -> training_pb2.TrainingSpec:
    options = dict(spec.options)
    values = {name: value for value, name in _PROPERTIES.items()}
    if "learnable_property" in options:
        options["learnable_property"] = values[options["learnable_property"]]
    return training_pb2.TrainingSpec(
        placeholder_token=spec.placeholder_token,
        options=training_pb2.LearnOptions(**options),
        overwrite=spec.overwrite,
        request_id=spec.request_id,
        preview_every_steps=spec.preview_every_steps,
    )


def training_to_proto(job: Job, queue_position: int) -> training_pb2.Training:
    """A training as it is now."""
    state = job.state
    return training_pb2.Training(
        training_id=job.training_id,
        state=_STATES[state.status],
        spec=spec_to_proto(job.record.spec),
        num_images=len(job.record.images),
        create_time=_timestamp(job.record.create_time),
        start_time=_timestamp(state.start_time),
        end_time=_timestamp(state.end_time),
        queue_position=queue_position,
        progress=_progress(state.progress) if state.progress else None,
        skipped_images=_skipped(state, job.record.images),
        error=state.error,
        concept_id=state.concept_id,
    )


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(seconds * 1e6))
    return timestamp


def _progress(progress: Progress) -> training_pb2.TrainingProgress:
    return training_pb2.TrainingProgress(
        step=progress.step,
        steps=progress.steps,
        loss=progress.loss,
        initial_evaluation_loss=progress.initial_evaluation_loss,
        best_evaluation_loss=progress.best_evaluation_loss,
        best_step=progress.best_step,
    )


def _skipped(
    state: TrainingState, images: tuple[UploadedImage, ...]
) -> list[training_pb2.SkippedImage]:
    return [
        training_pb2.SkippedImage(file_name=images[skipped.index].file_name, reason=skipped.reason)
        for skipped in state.skipped
    ]
