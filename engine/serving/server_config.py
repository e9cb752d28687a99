"""Everything that a server can be told, checked before anything is opened."""

from dataclasses import dataclass, field
from pathlib import Path

from engine.backends.names import check_backend
from engine.batching.config import BatcherConfig
from engine.endpoint import DEFAULT_ADDRESS, MAX_MESSAGE_BYTES
from engine.errors import ConfigError
from engine.image_jobs.job import JobLimits
from engine.operations.config import OperationsConfig
from engine.requests import Limits
from engine.security.config import SecurityConfig, check_listen
from engine.store.config import StoreLimits
from engine.training.config import TrainingConfig
from engine.worker.supervisor import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything that `oneword serve` can be told."""

    bundle: Path  # folder by build_engines.py
    bundle_dir: Path | None = None  # bundles to deploy by name while serving; None: none can be
    listen: str = DEFAULT_ADDRESS  # host:port, port 0 for a free one; or unix:PATH
    insecure: bool = False  # listen beyond this machine, without TLS or authentication
    security: SecurityConfig = field(default_factory=SecurityConfig)
    concept_dir: Path | None = None  # None: concepts are forgotten when the server stops
    job_dir: Path | None = None  # None: no jobs are kept
    jobs: JobLimits = field(default_factory=JobLimits)
    concept_index: str = ""  # postgresql://... in place of SQLite in concept_dir
    concept_files: str = ""  # a folder or the URL of a file system, in place of concept_dir
    store: StoreLimits = field(default_factory=StoreLimits)  # of those two, or of concept_dir
    # cpu, openvino, openvino-bf16, cuda, cuda-graphs, tensorrt, rtx (docs/backends.md), or one of
    # ONNX Runtime's execution providers; there is no fall-back
    backend: str = "cpu"
    model_process: bool = True  # the graphs in a process of their own, which may die and come back
    worker: WorkerConfig = field(default_factory=WorkerConfig)  # of that process
    batcher: BatcherConfig = field(default_factory=BatcherConfig)
    limits: Limits = field(default_factory=Limits)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    operations: OperationsConfig = field(default_factory=OperationsConfig)
    max_message_bytes: int = MAX_MESSAGE_BYTES  # each way
    max_concurrent_rpcs: int = 256  # more are refused
    host_threads: int = 2  # for tokenizing and picture coding
    grace_s: float = 30.0  # for requests under way when the server is told to stop
    stall_timeout_s: float = 60.0  # a caller that reads nothing for so long is dropped
    progress_interval_s: float = 0.1  # at least so long between two steps of an image in a stream
    reflection: bool = True  # describe the services to whoever asks

    def __post_init__(self) -> None:
        check_listen(self.listen, self.security, insecure=self.insecure)
        if self.training.training_model is not None and self.training_dir is None:
            raise ConfigError(
                "a server that learns must keep what it learned; give it a concept_dir, or a "
                "training_dir if its concepts are not to be kept"
            )
        check_backend(self.backend)
        for name in ("max_message_bytes", "max_concurrent_rpcs", "host_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("grace_s", "stall_timeout_s", "progress_interval_s"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def training_dir(self) -> Path | None:
        """Where trainings are kept: beside the stored concepts, unless told otherwise."""
        if self.training.training_dir is not None or self.concept_dir is None:
            return self.training.training_dir
        return self.concept_dir.with_name(f"{self.concept_dir.name}-training")
