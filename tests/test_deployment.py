"""Another bundle takes over while requests run: none is lost, and what fails changes nothing."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.batching.batcher import BatcherConfig, generate
from engine.concepts import Concept, concept_to_bytes
from engine.errors import ConceptMismatch, DeploymentFailed
from engine.pipeline import Pipeline
from engine.planner import Planner
from engine.requests import GenerationRequest
from engine.serving.deployment import Deployment
from engine.serving.server import GENERATION_SERVICE, Server
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import ConceptStore
from engine.worker.remote_model import RemoteModel, open_remote
from protos.oneword.v1.generation_pb2 import ConceptReference, GenerateRequest, InlineConcept
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub
from tests import faulty_worker
from tests.worker_harness import WAIT_S, altered_bundle, draw, request, wait_for_end

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST = request(num_inference_steps=4)


@pytest.fixture(scope="module")
def other_path(emoji_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return altered_bundle(emoji_bundle_path, tmp_path_factory.mktemp("other") / "other", "other")


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(faulty_worker.FAULTS, str(tmp_path))
    return tmp_path


@pytest.fixture
def deployment(emoji_bundle_path: Path, faults: Path) -> Iterator[Deployment]:
    open_model = partial(open_remote, module=faulty_worker.MODULE)
    planner, model = open_model(emoji_bundle_path)
    deployment = Deployment(planner, model, BatcherConfig(), open_model=open_model)
    yield deployment
    deployment.close()


def drawn_by(pipeline: Pipeline) -> np.ndarray[Any, Any]:
    (picture,) = draw(pipeline, pipeline.plan(REQUEST))
    assert isinstance(picture, np.ndarray)
    return picture


def draw_through(deployment: Deployment) -> np.ndarray[Any, Any]:
    with deployment.lease() as served:
        (image,), _ = generate(served.batcher, served.planner.plan(REQUEST))
    return image.image


class Stream:
    """Requests from two threads, one after another, until it is told to stop."""

    def __init__(self, deployment: Deployment) -> None:
        self.pictures: list[np.ndarray[Any, Any]] = []
        self.errors: list[Exception] = []
        self._deployment = deployment
        self._stop = threading.Event()
        self._drawn = threading.Condition()
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def wait_for_more(self, count: int) -> None:
        with self._drawn:
            wanted = len(self.pictures) + count
            assert self._drawn.wait_for(lambda: len(self.pictures) >= wanted or self.errors, WAIT_S)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _run(self) -> None:
        while not self._stop.is_set() and not self.errors:
            try:
                picture = draw_through(self._deployment)
            except Exception as error:
                self.errors.append(error)
            else:
                self.pictures.append(picture)
            with self._drawn:
                self._drawn.notify_all()


def test_a_stream_of_requests_loses_none_while_a_bundle_takes_over(
    deployment: Deployment, pipeline: Pipeline, other_path: Path
) -> None:
    old = deployment.current.model
    assert isinstance(old, RemoteModel) and old.pid is not None
    old_pid, before = old.pid, drawn_by(pipeline)
    after = drawn_by(Pipeline.open(other_path))
    assert not np.array_equal(before, after)
    stream = Stream(deployment)
    stream.wait_for_more(2)
    deployment.deploy(other_path)
    assert np.array_equal(draw_through(deployment), after)  # from the moment that it returns
    stream.wait_for_more(4)
    stream.stop()
    assert stream.errors == []
    # One after another in two threads: at most one picture of each may overlap the change.
    kinds = [
        "before" if np.array_equal(picture, before) else "after" for picture in stream.pictures
    ]
    for kind, picture in zip(kinds, stream.pictures, strict=True):
        assert kind == "before" or np.array_equal(picture, after)
    assert kinds[:2] == ["before"] * 2 and kinds[-2:] == ["after"] * 2
    assert deployment.wait_retired(WAIT_S)
    wait_for_end(old_pid)


def own_words(planner: Planner) -> GenerationRequest:
    """A request with a concept that was learned on this model."""
    return request("a <x>", concepts=(own_concept(planner),))


def own_concept(planner: Planner) -> Concept:
    text = planner.bundle.manifest.text
    return Concept(
        placeholder_token="<x>",
        learned_embeddings=np.full((1, text.dim), 0.1, np.float32),
        embedding_fingerprint=text.embedding_fingerprint,
    )


def test_the_old_bundle_finishes_what_it_has_and_the_new_one_refuses_its_words(
    deployment: Deployment, other_path: Path
) -> None:
    with deployment.lease() as served:
        plan, words = served.planner.plan(REQUEST), own_words(served.planner)
        served.planner.plan(words)
        deployment.deploy(other_path)
        assert deployment.current is not served
        with pytest.raises(DeploymentFailed, match="finishing its requests"):
            deployment.deploy(other_path)
        (image,), _ = generate(served.batcher, plan)  # though it was replaced before
        assert image.image.shape == (plan.height, plan.width, 3)
    with pytest.raises(ConceptMismatch, match="model 'other' has"):
        deployment.current.planner.plan(words)
    assert deployment.wait_retired(WAIT_S)


def test_what_cannot_take_over_leaves_the_old_one_serving(
    deployment: Deployment, pipeline: Pipeline, other_path: Path, faults: Path
) -> None:
    old = deployment.current
    model_name, expected = old.planner.bundle.manifest.model_name, drawn_by(pipeline)
    for order, bundle, reason in (
        ("", faults / "nothing", "bundle.json is missing"),
        ("vae_decoder.kill", other_path, "ended during decode"),
        ("denoiser.nan", other_path, "NaN or infinite"),
    ):
        if order:
            (faults / order).write_text("0")
        with pytest.raises(DeploymentFailed, match=f"{model_name} goes on serving: .*{reason}"):
            deployment.deploy(bundle)
        assert deployment.current is old
    assert np.array_equal(draw_through(deployment), expected)


# Behind gRPC


async def test_health_follows_the_process_and_the_bundle(
    emoji_bundle_path: Path, other_path: Path, faults: Path
) -> None:
    planner, model = open_remote(emoji_bundle_path, module=faulty_worker.MODULE)
    config = ServerConfig(bundle=emoji_bundle_path, listen="127.0.0.1:0")
    server = Server(planner, ConceptStore.temporary(), config, model=model)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # pyright: ignore[reportArgumentType]
        watch = health.Watch(health_pb2.HealthCheckRequest(service=GENERATION_SERVICE))
        whole = health.Watch(health_pb2.HealthCheckRequest())
        for watcher in (watch, whole):
            assert (await watcher.read()).status == SERVING
        stub = ImageGenerationServiceStub(channel)
        assert await last_event(stub, prompt="a cat") == "summary"
        (faults / "load.exit").touch()  # it stays away until this is gone
        kill(model)
        for watcher in (watch, whole):
            assert (await watcher.read()).status == NOT_SERVING
        response = await health.Check(
            health_pb2.HealthCheckRequest(service="oneword.v1.ConceptService")
        )
        assert response.status == SERVING
        (faults / "load.exit").unlink()
        for watcher in (watch, whole):
            assert (await watcher.read()).status == SERVING
        assert await last_event(stub, prompt="a dog") == "summary"
        await server.deploy(other_path)
        call = stub.Generate(GenerateRequest(prompt="a cat", num_inference_steps=2))
        responses = [response async for response in call]
        assert responses[-1].summary.model_name == "other"
        await refuse_words_of(planner, stub)
        assert await asyncio.to_thread(server.deployment.wait_retired, WAIT_S)
        new = server.deployment.current.model
        assert isinstance(new, RemoteModel)
        kill(new)  # health is the new one's from now on
        assert (await watch.read()).status == NOT_SERVING
        await server.stop()
    assert not new.state[0] and new.pid is None


async def last_event(stub: ImageGenerationServiceStub, **fields: Any) -> str | None:
    call: Any = stub.Generate(GenerateRequest(num_inference_steps=2, **fields), timeout=WAIT_S)
    responses = [response async for response in call]
    return responses[-1].WhichOneof("event")


async def refuse_words_of(planner: Planner, stub: ImageGenerationServiceStub) -> None:
    inline = InlineConcept(safetensors=concept_to_bytes(own_concept(planner)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await last_event(stub, prompt="a <x>", concepts=[ConceptReference(inline=inline)])
    assert caught.value.code() == StatusCode.FAILED_PRECONDITION
    assert "was learned on a text encoder with fingerprint" in (caught.value.details() or "")


def kill(model: RemoteModel) -> None:
    assert model.pid is not None
    os.kill(model.pid, signal.SIGKILL)
