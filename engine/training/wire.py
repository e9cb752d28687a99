"""Trainings in the words of the API: pure functions without a server."""

from google.protobuf.timestamp_pb2 import Timestamp

from engine.concepts import MAX_NUM_VECTORS
from engine.serving.wire import timestamp_to_proto
from engine.training.config import TrainingConfig
from engine.training.folder import Status, TrainingState, UploadedImage
from engine.training.job import Job
from engine.training.option_wire import options_from_proto, options_to_proto
from engine.training.reports import Progress
from engine.training.spec import MAX_CAPTIONS_BYTES, MAX_IMAGE_PIXELS, TrainingSpec
from protos.oneword.v1 import server_info_pb2, training_pb2

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
    return TrainingSpec(
        placeholder_token=message.placeholder_token,
        options=options_from_proto(message.options),
        overwrite=message.overwrite,
        request_id=message.request_id,
        preview_every_steps=message.preview_every_steps,
    )


def spec_to_proto(spec: TrainingSpec) -> training_pb2.TrainingSpec:
    return training_pb2.TrainingSpec(
        placeholder_token=spec.placeholder_token,
        options=options_to_proto(spec.options),
        overwrite=spec.overwrite,
        request_id=spec.request_id,
        preview_every_steps=spec.preview_every_steps,
    )


def training_to_proto(job: Job, queue_position: int) -> training_pb2.Training:
    """A training as it is now."""
    state, images = job.state, job.record.images
    return training_pb2.Training(
        training_id=job.training_id,
        state=_STATES[state.status],
        spec=spec_to_proto(job.record.spec),
        num_images=len(images),
        create_time=_timestamp(job.record.create_time),
        start_time=_timestamp(state.start_time),
        end_time=_timestamp(state.end_time),
        queue_position=queue_position,
        progress=_progress(state.progress) if state.progress else None,
        skipped_images=_skipped(state, images),
        error=state.error,
        concept_id=state.concept_id,
        num_masks=sum(bool(image.mask_sha256) for image in images),
        num_captioned_images=sum(bool(image.captions_sha256) for image in images),
    )


def _timestamp(seconds: float | None) -> Timestamp | None:
    return None if seconds is None else timestamp_to_proto(seconds)


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


def limits_to_proto(config: TrainingConfig) -> server_info_pb2.TrainingLimits:
    """What a server publishes of its limits."""
    limits = config.limits
    return server_info_pb2.TrainingLimits(
        max_images=limits.max_images,
        max_image_bytes=limits.max_image_bytes,
        max_image_pixels=MAX_IMAGE_PIXELS,
        max_captions_bytes=MAX_CAPTIONS_BYTES,
        max_upload_bytes=limits.max_upload_bytes,
        upload_timeout_s=config.upload_timeout_s,
        max_steps=limits.max_steps,
        max_batch_size=limits.max_batch_size,
        max_num_vectors=MAX_NUM_VECTORS,
        max_uploads=limits.max_uploads,
        max_training_jobs=config.max_training_jobs,
        max_queued_trainings=config.max_queued_trainings,
        max_attempts=config.max_attempts,
        max_kept_trainings=limits.max_kept_trainings,
    )
