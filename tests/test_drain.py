"""A server process that is told to stop while many requests are under way."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.oneword.v1.generation_pb2 import GenerateRequest
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub
from tests.conftest import ROOT
from tests.fakes import WAIT_S
from tests.service_harness import details

NUM_REQUESTS = 50
LONG_S = 6 * WAIT_S
# Draws nothing until it is sent SIGUSR1.
_SERVE = """
import asyncio, signal, sys, threading
from pathlib import Path
from engine.batching.batcher import BatcherConfig
from engine.pipeline import Pipeline
from engine.serving.serve import serve
from engine.serving.server_config import ServerConfig
from tests.fakes import FakeDenoiser, make_pipeline

class Gate(threading.Event):
    def wait(self, timeout=None):
        return super().wait(600.0)

denoiser = FakeDenoiser()
denoiser.gate = Gate()
signal.signal(signal.SIGUSR1, lambda *_: denoiser.gate.set())
Pipeline.open = lambda *_arguments, **_settings: make_pipeline(denoiser)
config = ServerConfig(
    bundle=Path("none"), listen="127.0.0.1:0", grace_s=float(sys.argv[1]), model_process=False,
    batcher=BatcherConfig(max_queued_images=1000, cost_measurement_s=0.0),
)
asyncio.run(serve(config, lambda address: print(address, flush=True)))
"""


@contextmanager
def serving(grace_s: float) -> "Generator[tuple[subprocess.Popen[str], grpc.Channel]]":
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(grace_s)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout
            with grpc.insecure_channel(process.stdout.readline().strip()) as channel:
                yield process, channel
        finally:
            process.kill()


def start_requests(channel: grpc.Channel) -> list[Any]:
    """Many requests, all accepted by the server."""
    stub = ImageGenerationServiceStub(channel)
    request = GenerateRequest(prompt="a cat", num_inference_steps=2)
    calls = [stub.Generate(request, timeout=LONG_S) for _ in range(NUM_REQUESTS)]
    for call in calls:
        assert next(call).HasField("accepted")
    return calls


def end_of(call: Any) -> StatusCode:
    try:
        events = list(call)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code()
    assert events[-1].HasField("summary")
    return StatusCode.OK


def watch(channel: grpc.Channel) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # pyright: ignore[reportArgumentType]
    return stub.Watch(health_pb2.HealthCheckRequest(), timeout=LONG_S)


def test_all_that_was_accepted_is_finished_within_the_grace() -> None:
    states = health_pb2.HealthCheckResponse
    with serving(grace_s=LONG_S) as (process, channel):
        health = watch(channel)
        assert next(health).status == states.SERVING
        calls = start_requests(channel)
        process.send_signal(signal.SIGTERM)
        assert next(health).status == states.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(ImageGenerationServiceStub(channel).Generate(GenerateRequest(), timeout=WAIT_S))
        refused: Any = caught.value
        assert refused.code() == StatusCode.UNAVAILABLE
        assert details(refused)["google.rpc.RetryInfo"].retry_delay.seconds == 1
        process.send_signal(signal.SIGUSR1)  # what is under way goes on
        assert [end_of(call) for call in calls] == [StatusCode.OK] * NUM_REQUESTS
        assert process.wait(LONG_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_what_hangs_is_told_so_before_the_grace_ends(number: signal.Signals) -> None:
    with serving(grace_s=0.5) as (process, channel):
        calls = start_requests(channel)
        process.send_signal(number)
        # A call of the model hangs and goes on hanging: every caller is told all the same.
        assert [end_of(call) for call in calls] == [StatusCode.UNAVAILABLE] * NUM_REQUESTS
        assert process.poll() is None
        process.send_signal(number)  # the second time at once, whatever hangs
        assert process.wait(LONG_S) == -number
