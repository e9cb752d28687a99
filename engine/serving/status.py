"""Errors of the runtime as gRPC statuses, with the details that a program can act on.

The details are those of google/rpc/error_details.proto, in the trailer `grpc-status-details-bin`.
"""

import math
import re
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from grpc_status import rpc_status

from engine import errors
from engine.errors import (
    EngineError,
    InvalidRequest,
    QueueFull,
    RateLimited,
    ShuttingDown,
    StoreError,
    UnknownBundle,
    UnknownConcept,
    UnknownJob,
    UnknownTraining,
    WorkerDied,
)
from protos.oneword.v1 import generation_pb2

DOMAIN = "oneword"
PUSHBACK = "grpc-retry-pushback-ms"
# Text of callers comes back in errors; trailers beyond some 8 KiB would break the connection.
MAX_MESSAGE_BYTES = 800

STATUS: dict[type[EngineError], StatusCode] = {
    errors.EngineError: StatusCode.INTERNAL,
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.ConceptUnreadable: StatusCode.INVALID_ARGUMENT,
    errors.PromptTooLong: StatusCode.INVALID_ARGUMENT,
    errors.UnknownConcept: StatusCode.NOT_FOUND,
    errors.UnknownTraining: StatusCode.NOT_FOUND,
    errors.UnknownJob: StatusCode.NOT_FOUND,
    errors.UnknownBundle: StatusCode.NOT_FOUND,
    errors.JobNotEnded: StatusCode.FAILED_PRECONDITION,
    errors.JobsUnavailable: StatusCode.FAILED_PRECONDITION,
    errors.ConceptExists: StatusCode.ALREADY_EXISTS,
    errors.StaleEtag: StatusCode.ABORTED,
    errors.ConceptMismatch: StatusCode.FAILED_PRECONDITION,
    errors.TrainingUnavailable: StatusCode.FAILED_PRECONDITION,
    errors.TrainingNotEnded: StatusCode.FAILED_PRECONDITION,
    errors.QueueFull: StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: StatusCode.PERMISSION_DENIED,
    errors.RateLimited: StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: StatusCode.CANCELLED,
    errors.ShuttingDown: StatusCode.UNAVAILABLE,
    errors.WorkerDied: StatusCode.UNAVAILABLE,
    errors.DeploymentFailed: StatusCode.FAILED_PRECONDITION,
    errors.DeploymentUnderWay: StatusCode.FAILED_PRECONDITION,
    errors.BundlesUnavailable: StatusCode.FAILED_PRECONDITION,
    errors.NumericalError: StatusCode.FAILED_PRECONDITION,
    errors.StoreError: StatusCode.UNAVAILABLE,
    errors.StorageFull: StatusCode.RESOURCE_EXHAUSTED,
    errors.TenantFull: StatusCode.RESOURCE_EXHAUSTED,
    errors.ConceptDamaged: StatusCode.DATA_LOSS,
    # Raised at start-up only; in an RPC they would be a bug of ours.
    errors.BundleError: StatusCode.INTERNAL,
    errors.ConfigError: StatusCode.INTERNAL,
    errors.ProviderUnavailable: StatusCode.INTERNAL,
}
# Where the API calls a field otherwise than engine.requests does.
_API_FIELDS = {"preview_every": "preview_every_steps"}


def is_internal(error: Exception) -> bool:
    """Whether the text of an error is none of the caller's business."""
    return not isinstance(error, EngineError) or STATUS[type(error)] is StatusCode.INTERNAL


def status_of(error: Exception, request_id: str) -> grpc.Status:
    """The status of a failed call; what is a bug of ours shows the request id and nothing else."""
    if isinstance(error, EngineError) and not is_internal(error):
        code, message = STATUS[type(error)], _clip(str(error))
        details = [_error_info(error), *_details(error)]
    else:
        code, details = StatusCode.INTERNAL, []
        message = _internal(request_id)
    details.append(error_details_pb2.RequestInfo(request_id=request_id))
    number: int = code.value[0]
    status = rpc_status.to_status(
        Status(code=number, message=message, details=[_pack(detail) for detail in details])
    )
    trailers = (*(status.trailing_metadata or ()), *_pushback(error))
    return _CallStatus(status.code, status.details, trailers)


@dataclass(frozen=True)
class _CallStatus(grpc.Status):
    code: StatusCode  # pyright: ignore[reportIncompatibleVariableOverride]
    details: str | None  # pyright: ignore[reportIncompatibleVariableOverride]
    trailing_metadata: tuple[tuple[str, str | bytes], ...]  # pyright: ignore[reportIncompatibleVariableOverride]


def _pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """When a client that retries by itself is to do so (gRFC A6); programs read RetryInfo."""
    match error:
        case QueueFull(retry_after_s=retry_after_s) | RateLimited(retry_after_s=retry_after_s):
            return ((PUSHBACK, str(math.ceil(retry_after_s * 1e3))),)
        case WorkerDied():
            # It was in the calls that ended several processes (engine/batching/step_loop.py): sent
            # again by a machine, it would end as many more.
            return ((PUSHBACK, "-1"),)
        case _:
            return ()


def failure_of(error: Exception, request_id: str) -> generation_pb2.Failure:
    """The same as a message, where the failure of one thing does not end the call."""
    if not isinstance(error, EngineError) or is_internal(error):
        internal: int = StatusCode.INTERNAL.value[0]
        return generation_pb2.Failure(
            code=internal, message=_internal(request_id), reason="INTERNAL"
        )
    number: int = STATUS[type(error)].value[0]
    return generation_pb2.Failure(
        code=number,
        message=_clip(str(error)),
        reason=_reason(error),
        retry_after_s=error.retry_after_s if isinstance(error, QueueFull) else None,
    )


def _internal(request_id: str) -> str:
    return f"internal error; the server's log has it under request {request_id}"


def _error_info(error: EngineError) -> Message:
    return error_details_pb2.ErrorInfo(reason=_reason(error), domain=DOMAIN)


def _reason(error: Exception) -> str:
    return "_".join(re.findall(r"[A-Z][a-z]+", type(error).__name__)).upper()


def _details(error: EngineError) -> list[Message]:
    match error:
        case InvalidRequest(field=field) if field:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=_API_FIELDS.get(field, field), description=_clip(str(error))
            )
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case QueueFull(retry_after_s=retry_after_s) | RateLimited(retry_after_s=retry_after_s):
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(math.ceil(retry_after_s * 1e3))
            return [retry]
        case ShuttingDown():  # another server can take it at once, this one when it is back
            return [_retry_in_a_second()]
        case StoreError() if type(error) is StoreError:  # a full disk does not pass by itself
            return [_retry_in_a_second()]
        case UnknownConcept(placeholder_token=token):
            return [_resource("concept", token)]
        case UnknownTraining(training_id=training_id):
            return [_resource("training", training_id)]
        case UnknownJob(job_id=job_id):
            return [_resource("job", job_id)]
        case UnknownBundle(bundle_name=bundle_name):
            return [_resource("bundle", bundle_name)]
        case _:
            return []


def _retry_in_a_second() -> Message:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromSeconds(1)
    return retry


def _resource(kind: str, name: str) -> Message:
    return error_details_pb2.ResourceInfo(resource_type=kind, resource_name=_clip(name))


def _pack(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _clip(text: str) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return text
    return encoded[:MAX_MESSAGE_BYTES].decode(errors="ignore") + "..."
