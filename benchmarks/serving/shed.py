"""How soon a loaded server says no: a queue without room, and a deadline that cannot be met.

Both cores compute for others meanwhile. The caller's clock tells the round trip, the server's
access log (`duration_ms`, from the call's headers to its status) the part that the server takes.
"""

import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from tqdm import tqdm

from benchmarks.serving.background import busy
from benchmarks.serving.server_process import RunningServer, running_server
from benchmarks.serving.settings import Settings
from benchmarks.serving.spread import spread
from engine.batching.config import BatcherConfig
from engine.operations.calls import REQUEST_ID_HEADER
from engine.operations.config import OperationsConfig
from protos.oneword.v1.generation_pb2 import GenerateRequest

STEPS = 50  # of the requests that fill the server
QUEUE = 8
# Far less than the work ahead, and far more than a refusal takes: should the server let the time
# pass, that would show as a latency of this size.
IMPOSSIBLE_S = 0.5
PAUSE_S = 0.02
WARM_UP = 10
_REQUEST_ID = re.compile(r" request_id=(\S+)")
EXHAUSTED, LATE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED


def measure(settings: Settings) -> dict[str, Any]:
    batcher = BatcherConfig(max_queued_images=QUEUE)
    full = batcher.max_images_in_flight + QUEUE
    with tempfile.TemporaryDirectory() as folder:
        with running_server(
            Path(folder),
            bundle=settings.bundle,
            batcher=batcher,
            operations=OperationsConfig(log_format="json"),
        ) as server:
            with busy(server, full, num_inference_steps=STEPS):
                queue_full = _probe(server, settings.shed_probes, EXHAUSTED, "full queue", None)
            with busy(server, full - QUEUE // 2, num_inference_steps=STEPS):
                too_late = _probe(
                    server, settings.shed_probes, LATE, "impossible deadline", IMPOSSIBLE_S
                )
        inside = dict(_durations(server.log))
    return {
        "in_flight": batcher.max_images_in_flight,
        "queue": QUEUE,
        "impossible_deadline_s": IMPOSSIBLE_S,
        "queue_full": _summary(queue_full, inside),
        "deadline": _summary(too_late, inside),
    }


def _probe(
    server: RunningServer,
    count: int,
    code: grpc.StatusCode,
    title: str,
    timeout_s: float | None,
) -> dict[str, float | None]:
    """Round trips in ms by the id of the call; None for one that was let in."""
    found = dict[str, float | None]()
    request = GenerateRequest(prompt="a photo of a cat", num_inference_steps=STEPS, seed=1)
    for number in tqdm(range(WARM_UP + count), desc=title, unit="refusal"):
        request_id = f"{code.name}-{number}"
        metadata = ((REQUEST_ID_HEADER, request_id),)
        started = time.perf_counter()
        call = server.generation.Generate(request, timeout=timeout_s, metadata=metadata)
        error = _first_error(call)
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        if error is not None and error is not code:
            raise RuntimeError(f"not {code.name}: {error.name}, {call.details()}")
        if number >= WARM_UP:
            found[request_id] = None if error is None else elapsed_ms
        time.sleep(PAUSE_S)
    return found


def _first_error(call: Any) -> grpc.StatusCode | None:
    """The status of a call that is refused; one that is let in is cancelled."""
    try:
        next(call)
    except grpc.RpcError:
        return call.code()
    call.cancel()
    return None


def _durations(log: Path) -> Iterator[tuple[str, float]]:
    """Milliseconds in the server, by the id of the call."""
    for line in log.read_text().splitlines():
        entry = json.loads(line) if line.startswith("{") else {}
        if "duration_ms" in entry and (found := _REQUEST_ID.search(entry["message"])):
            yield found[1], entry["duration_ms"]


def _summary(round_trips: dict[str, float | None], inside: dict[str, float]) -> dict[str, Any]:
    refused = {name: ms for name, ms in round_trips.items() if ms is not None}
    return {
        "let_in": len(round_trips) - len(refused),
        "round_trip_ms": spread(list(refused.values())),
        "in_server_ms": spread([inside[name] for name in refused]),
    }
