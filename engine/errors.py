"""Every error that the runtime can raise on purpose.

    EngineError
    |-- InvalidRequest          the caller can mend the request
    |   |-- ConceptUnreadable   a concept file or its vectors cannot be used at all
    |   `-- PromptTooLong       the prompt needs more chunks than the server allows
    |-- UnknownConcept          a name that no stored or inline concept has
    |-- UnknownTraining         an id that no training has
    |-- UnknownBundle           a name that no bundle has which could be put in service
    |-- ConceptExists           the placeholder is taken by other vectors
    |-- StaleEtag               the name has changed since the caller looked at it
    |-- ConceptMismatch         a sound concept that belongs to another model
    |-- TrainingUnavailable     this server cannot learn; says what it lacks
    |-- TrainingNotEnded        a training that must end first
    |-- QueueFull               no room: try again later
    |-- Unauthenticated         the caller is not known
    |-- PermissionDenied        the caller is known, and may not do this
    |-- RateLimited             the caller's tenant has used up its share: try again later
    |-- DeadlineExceeded        the caller's deadline has passed
    |-- Cancelled               the caller went away
    |-- ShuttingDown            the server is draining
    |-- WorkerDied              the model's process ended under a call; it is started again
    |-- NumericalError          the model produced NaN or infinite values
    |-- BundleError             the bundle on disk is missing, broken, or of another version
    |-- BundlesUnavailable      this server has no bundles to choose from
    |-- DeploymentFailed        a new bundle could not take over; the old one goes on serving
    |   `-- DeploymentUnderWay  another one is being put in service
    |-- StoreError              what is stored cannot be read or written now
    |   |-- StorageFull         no room on the disk
    |   |   `-- TenantFull      no room in the share of a tenant
    |   `-- ConceptDamaged      a stored concept is not what was stored
    |-- ConfigError             the server cannot run as it was told to
    `-- ProviderUnavailable     the backend that was asked for cannot be had

Each message gives the value, the limit and the remedy. `engine.serving.status.STATUS` maps every
class to a gRPC status; a test asserts that none is missing.
"""

_MOST_QUOTED = 80  # characters of a caller's value in a message


def quoted(value: str) -> str:
    """A caller's text for a message: in quotes, escaped, and short, so that the remedy is read."""
    text = repr(value)
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}...'"


class OneWordError(Exception):
    """Whatever goes wrong for a reason that a person can mend; commands print it as one line."""


class EngineError(OneWordError):
    """Base of all errors of the runtime."""


class InvalidRequest(EngineError):
    """The request cannot be served as it is; `field` names the part to mend."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ConceptUnreadable(InvalidRequest):
    """The bytes given as a concept are not a concept."""


class PromptTooLong(InvalidRequest):
    """The prompt is longer than the limits of the server."""


class UnknownConcept(EngineError):
    """A concept was named that is neither stored nor sent along."""

    def __init__(self, message: str, *, placeholder_token: str = "") -> None:
        super().__init__(message)
        self.placeholder_token = placeholder_token


class UnknownTraining(EngineError):
    """No training has this id."""

    def __init__(self, message: str, *, training_id: str) -> None:
        super().__init__(message)
        self.training_id = training_id


class UnknownJob(EngineError):
    """No job of the caller's has this id."""

    def __init__(self, message: str, *, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class UnknownBundle(EngineError):
    """No bundle that could be put in service has this name."""

    def __init__(self, message: str, *, bundle_name: str) -> None:
        super().__init__(message)
        self.bundle_name = bundle_name


class JobNotEnded(EngineError):
    """The job waits or runs, and what was asked for needs it ended."""


class JobsUnavailable(EngineError):
    """This server keeps no jobs."""


class ConceptExists(EngineError):
    """The placeholder token is taken by a concept with other vectors."""


class StaleEtag(EngineError):
    """A stored name has changed since the etag that the caller gave was read."""


class ConceptMismatch(EngineError):
    """The concept was learned for another text encoder."""


class TrainingUnavailable(EngineError):
    """This server cannot learn words: a package, a flag or the right model is missing."""


class TrainingNotEnded(EngineError):
    """The training is queued or runs, and what was asked for needs it ended."""


class QueueFull(EngineError):
    """The bounded queue has no room; `retry_after_s` is when it may have."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(EngineError):
    """No credentials, or none that count. Which it is, `reason` tells the log, and nobody else."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(
            "this call needs valid credentials: the header `authorization: Bearer TOKEN`, or a "
            "client certificate that the server knows"
        )
        self.reason = reason


class PermissionDenied(EngineError):
    """The caller's credentials lack the scope that the call needs."""


class RateLimited(EngineError):
    """The tenant has used up its rate or its calls at once; come back after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(EngineError):
    """The deadline passed before the images were done."""


class Cancelled(EngineError):
    """The caller cancelled the request."""


class ShuttingDown(EngineError):
    """The server is draining and takes no new work."""


class WorkerDied(EngineError):
    """The process that has the model ended, or was ended because it hung; another is started."""


class NumericalError(EngineError):
    """The model's output is not finite: a half-precision overflow, or a broken concept."""


class BundleError(EngineError):
    """The bundle cannot be opened; the message names both sides of the mismatch."""


class DeploymentFailed(EngineError):
    """A new bundle could not take over from the one in service, which goes on serving."""


class DeploymentUnderWay(DeploymentFailed):
    """Another bundle is being put in service, and there is memory for two models at most."""


class BundlesUnavailable(EngineError):
    """This server has no folder of bundles to choose from, or cannot read it."""


class StoreError(EngineError):
    """What is stored cannot be read or written now: a broken disk, a lock held too long."""


class StorageFull(StoreError):
    """The disk, or the share of it that the server may use, is full."""


class TenantFull(StorageFull):
    """What a tenant may store, in number or in bytes, is used up."""


class ConceptDamaged(StoreError):
    """The file of a stored concept is missing, or not the one that was stored."""


class ConfigError(EngineError):
    """The configuration cannot be used; the message says which setting and how to mend it."""


class ProviderUnavailable(EngineError):
    """The execution provider that was asked for is not there; there is no quiet fall-back."""
