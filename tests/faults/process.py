"""A running server, as a process of its own on the embedded model, and how it is called."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from engine.client.calls import Stubs
from engine.concepts import Concept, concept_to_bytes
from protos.oneword.v1 import generation_pb2 as pb
from protos.oneword.v1.concepts_pb2 import (
    ExportConceptRequest,
    GetConceptRequest,
    ImportConceptRequest,
    ImportConceptResponse,
    ListConceptsRequest,
)
from tests.conftest import ROOT
from tests.soak import gauges

WAIT_S = 60.0  # a guard; what is waited for takes seconds at most
LONG_S = 600.0  # no request is refused because its deadline could not be met
DIM = 192  # of the embedded model's token embeddings
CONFIG = """
listen = "127.0.0.1:0"
grace_s = 20.0

[store]
busy_timeout_s = 0.5

[batcher]
cost_measurement_s = 0.0
max_queued_images = 1000
max_queued_ms = 600000
"""


@dataclass(kw_only=True)
class RunningServer:
    """One process, from its start to its end."""

    bundle: Path
    folder: Path  # of concepts and jobs
    log: Path
    config: str = CONFIG
    module: str = "oneword"
    environment: dict[str, str] = field(default_factory=dict[str, str])
    flags: tuple[str, ...] = ()
    token: str = ""  # of the caller

    def __post_init__(self) -> None:
        config = self.log.with_suffix(".toml")
        config.write_text(self.config)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", self.module, "serve", "--config", str(config)),
                    *("--bundle", str(self.bundle), "--concept-dir", str(self.folder / "concepts")),
                    *("--job-dir", str(self.folder / "jobs")),
                    *self.flags,
                ],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.log.read_text()
        self.address = line.removeprefix("listening on ").strip()
        self.channel = grpc.insecure_channel(self.address)
        self.call_as(self.token)

    def call_as(self, token: str) -> None:
        """Call with this token from now on, or with none."""
        bearer = [Bearer(token)] if token else []
        self.stubs = Stubs(grpc.intercept_channel(self.channel, *bearer))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(WAIT_S)
        self.close()
        return code

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    @property
    def worker_pid(self) -> int:
        """The process that has the model."""
        (pid,) = gauges.children(self.process.pid)
        return pid

    # Calls

    def draw(self, **fields: Any) -> list[bytes]:
        """The images of a request."""
        return images_of(self.begin(**fields))

    def begin(self, **fields: Any) -> Any:
        """A request under way: its stream."""
        return self.stubs.generation.Generate(asked(**fields), timeout=LONG_S)

    def publish(self, token: str, value: float = 0.1, **fields: Any) -> ImportConceptResponse:
        request = ImportConceptRequest(content=concept_file(token, value), **fields)
        return self.stubs.concepts.ImportConcept(request, timeout=WAIT_S)

    def concepts(self) -> list[str]:
        """The names that are stored."""
        answer = self.stubs.concepts.ListConcepts(ListConceptsRequest(), timeout=WAIT_S)
        return [concept.placeholder_token for concept in answer.concepts]

    def concept_id(self, token: str) -> str:
        request = GetConceptRequest(placeholder_token=token)
        return self.stubs.concepts.GetConcept(request, timeout=WAIT_S).concept.concept_id

    def export(self, token: str) -> bytes:
        """The file of a concept."""
        request = ExportConceptRequest(placeholder_token=token)
        return self.stubs.concepts.ExportConcept(request, timeout=WAIT_S).content

    def submit(self, **fields: Any) -> pb.Job:
        request = pb.SubmitJobRequest(request=asked(**fields))
        return self.stubs.jobs.SubmitJob(request, timeout=WAIT_S).job

    def job(self, job_id: str) -> pb.Job:
        request = pb.GetJobRequest(job_id=job_id)
        return self.stubs.jobs.GetJob(request, timeout=WAIT_S).job

    def watch(self, job_id: str) -> Any:
        request = pb.WatchJobRequest(job_id=job_id, with_images=True)
        return self.stubs.jobs.WatchJob(request, timeout=WAIT_S)

    def images_of_job(self, job_id: str) -> list[bytes]:
        """Those of a job that succeeds, in the order of their seeds."""
        answers = list(self.watch(job_id))
        assert answers[-1].job.state == pb.JOB_STATE_SUCCEEDED, answers[-1]
        found = [answer.image for answer in answers if answer.HasField("image")]
        return [image.image for image in sorted(found, key=lambda image: image.image_index)]

    def check_log(self) -> None:
        """Whatever happened, it was foreseen."""
        text = self.log.read_text()
        for unforeseen in ("Traceback", "never retrieved", " INTERNAL "):
            assert unforeseen not in text, text[-4000:]


class Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends a token along with each call."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)

    def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return continuation(client_call_details._replace(metadata=self._metadata), request)

    def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return continuation(client_call_details._replace(metadata=self._metadata), request)


@contextmanager
def running(bundle: Path, folder: Path, log: Path, **settings: Any) -> Generator[RunningServer]:
    server = RunningServer(bundle=bundle, folder=folder, log=log, **settings)
    try:
        yield server
    finally:
        server.close()


def asked(**fields: Any) -> pb.GenerateRequest:
    fields = {"prompt": "a red dog", "seed": 7, "num_inference_steps": 4, **fields}
    return pb.GenerateRequest(**fields)


def concept_file(token: str, value: float = 0.1, num_vectors: int = 2) -> bytes:
    vectors = np.full((num_vectors, DIM), value, np.float32)
    return concept_to_bytes(Concept(placeholder_token=token, learned_embeddings=vectors))


def images_of(stream: Any) -> list[bytes]:
    """The images of a stream that ends well."""
    events = list(stream)
    assert events[-1].HasField("summary")
    found = [event.image for event in events if event.HasField("image")]
    return [image.image for image in sorted(found, key=lambda image: image.image_index)]


@dataclass(frozen=True)
class Refusal:
    """How a call failed."""

    code: StatusCode
    text: str
    retry_after_s: float | None


def refusal(call: Callable[[], Any]) -> Refusal:
    """How a call fails that must fail; a stream is read to its end."""
    outcome = outcome_of(call)
    assert isinstance(outcome, Refusal), outcome
    return outcome


def outcome_of(call: Callable[[], Any]) -> Any:
    """What a call gives, or its refusal."""
    try:
        return call()
    except grpc.RpcError as error:
        known: Any = error
        return Refusal(known.code(), known.details() or "", _retry_after_s(known))


def _retry_after_s(error: Any) -> float | None:
    retry = error_details_pb2.RetryInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in Status.FromString(value).details:
                if detail.Unpack(retry):
                    return retry.retry_delay.ToTimedelta().total_seconds()
    return None


def until(holds: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    """Wait for what must come."""
    ends = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends, f"{what}: not within {within_s:g} s"
        time.sleep(0.02)
