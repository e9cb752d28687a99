"""A server that tells what its model is called for and what memory it holds.

    python -m benchmarks.serving.probed_server CONFIG

All of it is the server of `oneword serve`; between batcher and model stands a probe. Each line on
stdin is a word, each answer a line of JSON on stdout:
    calls   the calls of the model since the last time: [what, begin, end, seeds], `time.monotonic`;
            each step by itself, and `hold`
    memory  live heap of this process and resident memory of the model's, when no call is under way
"""

import asyncio
import gc
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.live_heap import live_heap_bytes
from engine.batching.model import Model, Span
from engine.config_file import build, read_config_file
from engine.operations.memory import children_resident_bytes, resident_bytes
from engine.planner import GenerationPlan
from engine.serving.deployment import close_model, measured
from engine.serving.model_opening import in_daemon_thread, model_opener
from engine.serving.serve import open_store
from engine.serving.server import Server
from engine.serving.server_config import ServerConfig

IDLE_POLL_S = 0.01


class ProbedModel:
    """A model whose calls are noted."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._calls: list[tuple[str, float, float, list[int]]] = []

    def take_calls(self) -> list[tuple[str, float, float, list[int]]]:
        """The calls since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def begin(self, plan: GenerationPlan) -> Any:
        started = time.monotonic()
        images = self._model.begin(plan)
        self._note("begin", started, images)
        return images

    def step(self, images: Sequence[Any], *, at_most: int = 1) -> Sequence[Span] | None:
        started, seeds = time.monotonic(), [image.seed for image in images]
        spans = self._model.step(images, at_most=at_most)
        for begin, end in spans or [(started, time.monotonic())]:
            self._calls.append(("step", begin, end, seeds))
        return spans

    def hold(self) -> None:
        """Called as soon as a request has come or was cancelled, on whatever thread."""
        started = time.monotonic()
        self._model.hold()
        self._note("hold", started, [])

    def decode(self, images: Sequence[Any]) -> Any:
        started = time.monotonic()
        pictures = self._model.decode(images)
        self._note("decode", started, images)
        return pictures

    def preview(self, image: Any) -> Any:
        return self._model.preview(image)

    def row_cost(self, image: Any) -> float:
        return self._model.row_cost(image)

    def release(self, images: Sequence[Any]) -> None:
        """Called as soon as the batcher has given the slots of these images to nobody."""
        started = time.monotonic()
        self._model.release(images)
        self._note("release", started, images)

    def wait_ready(self, timeout_s: float) -> bool:
        return self._model.wait_ready(timeout_s)

    def _note(self, what: str, started: float, images: Sequence[Any]) -> None:
        seeds = [image.seed for image in images]
        self._calls.append((what, started, time.monotonic(), seeds))


class Desk:
    """Answers words until stdin ends."""

    def __init__(self, server: Server, probe: ProbedModel) -> None:
        self._server, self._probe = server, probe

    def serve(self) -> None:
        answers = {"calls": self._probe.take_calls, "memory": self._memory}
        for line in sys.stdin:
            print(json.dumps(answers[line.strip()]()), flush=True)

    def _memory(self) -> dict[str, Any]:
        while self._server.operations.calls_in_flight or self._server.batcher.load != (0, 0):
            time.sleep(IDLE_POLL_S)
        self._probe.take_calls()
        for _ in range(3):  # what the first frees may free more
            gc.collect()
        return {
            "heap_bytes": live_heap_bytes(),
            "resident_bytes": resident_bytes(),
            "model_resident_bytes": children_resident_bytes(),
        }


async def serve_probed(config: ServerConfig) -> None:
    planner, model = await in_daemon_thread(model_opener(config), config.bundle)
    costs = await asyncio.to_thread(measured, planner, model, config.batcher)
    probe = ProbedModel(model)
    server = Server(planner, open_store(config), config, model=probe, costs=costs)
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    try:
        print(f"listening on {await server.start()}", flush=True)
        threading.Thread(target=Desk(server, probe).serve, daemon=True).start()
        await told_to_stop.wait()
    finally:
        await server.stop()
        close_model(model)


def main() -> None:
    path = Path(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    config = build(ServerConfig, read_config_file(path), folder=path.parent, source=str(path))
    asyncio.run(serve_probed(config))


if __name__ == "__main__":
    main()
