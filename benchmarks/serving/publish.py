"""From the import of a concept to the first request that may use it, at this server and at another.

Two servers share one store: SQLite in a folder, and PostgreSQL with files in a folder where it is
installed. A concept is imported at one of them; at once both are asked to draw with it, again and
again until they accept it. Then other vectors are stored under the same name, until both draw with
those. With both servers idle, and with both drawing for others.
"""

import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tqdm import tqdm

from benchmarks.serving.background import busy
from benchmarks.serving.server_process import RunningServer, running_server
from benchmarks.serving.settings import Settings
from benchmarks.serving.spread import spread
from engine.bundle import read_manifest
from engine.concepts import Concept, concept_to_bytes
from protos.oneword.v1.concepts_pb2 import ImportConceptRequest
from protos.oneword.v1.generation_pb2 import GenerateRequest

OTHERS, OTHERS_STEPS = 2, 20
RETRY_S = 0.002
HERE, ELSEWHERE = "same_server", "other_server"
GIVE_UP_S = 60.0

Times = dict[str, list[float]]


def measure(settings: Settings) -> dict[str, Any]:
    dim = read_manifest(settings.bundle).text.dim
    results: dict[str, Any] = {"publications": settings.publications}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        results["sqlite"] = _measure(
            settings, dim, folder / "sqlite", {"concept_dir": folder / "concepts"}
        )
        if (url := stack.enter_context(_postgres())) is not None:
            place = {"concept_index": url, "concept_files": str(folder / "files")}
            results["postgresql"] = _measure(settings, dim, folder / "postgresql", place)
    return results


@contextmanager
def _postgres() -> Generator[str | None]:
    """The URL of a new database; None where PostgreSQL is not installed.

    The tests know how one is started; they skip where there is none, which is an exception.
    """
    import pytest

    from tests.postgres_server import running_server as running_postgres

    with ExitStack() as stack:
        try:
            server = stack.enter_context(running_postgres())
            url = stack.enter_context(server.schema())
        except pytest.skip.Exception:
            url = None
        yield url


def _measure(settings: Settings, dim: int, folder: Path, place: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running_server(folder, name=name, bundle=settings.bundle, **place))
            for name in (HERE, ELSEWHERE)
        ]
        for server in servers:  # all is loaded and connected
            _draw(server, "a cat")
        idle = _publish_many(servers, dim, settings.publications, f"{folder.name}, idle")
        for server in servers:
            stack.enter_context(busy(server, OTHERS, num_inference_steps=OTHERS_STEPS))
        loaded = _publish_many(servers, dim, settings.publications, f"{folder.name}, busy")
    return {"idle": idle, "busy": loaded}


def _publish_many(servers: list[RunningServer], dim: int, count: int, title: str) -> dict[str, Any]:
    times: Times = {}
    retries = 0
    for number in tqdm(range(count), desc=f"publish, {title}", unit="concept"):
        token = f"<{title.replace(', ', '-')}-{number}>"
        at, other = servers[number % 2], servers[1 - number % 2]
        for kind, seed in (("new", 2 * number), ("replaced", 2 * number + 1)):
            retries += _publish(at, other, _concept(token, dim, seed), kind, times)
    return {"refused_meanwhile": retries, **{name: spread(ms) for name, ms in times.items()}}


def _concept(token: str, dim: int, seed: int) -> Concept:
    vector = np.random.default_rng(seed).normal(0, 0.02, (1, dim)).astype(np.float32)
    return Concept(placeholder_token=token, learned_embeddings=vector)


def _publish(
    at: RunningServer, other: RunningServer, concept: Concept, kind: str, times: Times
) -> int:
    """Times from the start of the import, in ms; returns how often a server did not know yet."""
    request = ImportConceptRequest(content=concept_to_bytes(concept), overwrite=True)
    prompt = f"a photo of {concept.placeholder_token}"
    started = time.perf_counter()
    stored = at.concepts.ImportConcept(request).concept
    moments = {"imported": time.perf_counter()}
    with ThreadPoolExecutor(2) as pool:
        uses = {
            place: pool.submit(_until_used, server, prompt, stored.concept_id)
            for place, server in ((HERE, at), (ELSEWHERE, other))
        }
    for place, use in uses.items():
        moments[f"accepted_{place}"] = use.result().accepted
        moments[f"image_{place}"] = use.result().image
    for name, moment in moments.items():
        times.setdefault(f"{kind}_{name}_ms", []).append(1e3 * (moment - started))
    return sum(use.result().refusals for use in uses.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """The first request that a concept was drawn for; `time.perf_counter` values."""

    accepted: float
    image: float
    refusals: int  # requests before it


def _until_used(server: RunningServer, prompt: str, concept_id: str) -> Use:
    """Ask until a request is accepted and drawn with these vectors."""
    give_up = time.monotonic() + GIVE_UP_S
    refusals = 0
    while time.monotonic() < give_up:
        accepted, found = _draw(server, prompt)
        if found == [concept_id]:
            return Use(accepted=accepted, image=time.perf_counter(), refusals=refusals)
        refusals += 1
        time.sleep(RETRY_S)
    raise RuntimeError(f"{prompt!r} was not to be used within {GIVE_UP_S:g} s")


def _draw(server: RunningServer, prompt: str) -> tuple[float, list[str]]:
    """When a request was accepted, and the concepts that it was drawn with: none if one is not
    known."""
    request = GenerateRequest(prompt=prompt, num_inference_steps=1, seed=0, guidance_scale=1.0)
    accepted, found = 0.0, list[str]()
    try:
        for event in server.generation.Generate(request):
            if event.HasField("accepted"):
                accepted = time.perf_counter()
            elif event.HasField("summary"):
                found = [one.concept_id for one in event.summary.matched_concepts]
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:  # pyright: ignore
            raise
    return accepted, found
