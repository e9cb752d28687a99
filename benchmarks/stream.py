"""A stream of images at random arrival: every system gets the same requests at the same times.

Each system runs in a process of its own, with all cores to itself:
    python -m benchmarks.stream SYSTEM RATE COUNT
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import ROOT, Diffusers, OneWord, Work
from engine.batching.batcher import Event, Failed, Finished

# Requests differ in length, as those of different users do.
STEPS = (8, 12, 20, 30)
Send = Callable[[Work, Callable[[], None]], None]


def make_stream(rate: float, count: int, seed: int = 0) -> list[tuple[float, Work]]:
    """`count` requests with exponential gaps at `rate` per second: (arrival in s, work)."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1.0 / rate, count))
    steps = random.choice(STEPS, count)
    return [
        (float(at), Work(seed=index, num_inference_steps=int(n)))
        for index, (at, n) in enumerate(zip(arrivals, steps, strict=True))
    ]


def replay(stream: Sequence[tuple[float, Work]], send: Send) -> dict[str, float]:
    """Send each request at its time, whatever is still running; latencies in ms, images/s."""
    latencies: list[float] = []
    finished = threading.Semaphore(0)
    start = time.perf_counter()
    for at, work in stream:
        time.sleep(max(0.0, start + at - time.perf_counter()))

        def done(arrival: float = start + at) -> None:
            latencies.append(1e3 * (time.perf_counter() - arrival))
            finished.release()

        send(work, done)
    for _ in stream:
        finished.acquire()
    elapsed = time.perf_counter() - start
    return {
        "p50_ms": float(np.percentile(latencies, 50)),
        "p95_ms": float(np.percentile(latencies, 95)),
        "images_per_s": len(stream) / elapsed,
    }


def to_batcher(peer: OneWord) -> Send:
    """Continuous batching: a request joins at the next step."""

    def send(work: Work, done: Callable[[], None]) -> None:
        def listen(event: Event) -> None:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                done()

        peer.batcher.submit(peer.pipeline.plan(peer.request(work)), listen)

    return send


class Worker:
    """diffusers behind a queue: takes what waits, alone or in batches.

    A diffusers call has one step count for its batch, so only equal ones can be joined.
    """

    def __init__(self, peer: Diffusers, max_batch: int) -> None:
        self._peer = peer
        self._max_batch = max_batch
        self._queue: queue.Queue[tuple[Work, Callable[[], None]]] = queue.Queue()

    def send(self, work: Work, done: Callable[[], None]) -> None:
        self._queue.put((work, done))

    def run(self, count: int) -> None:
        """Draw `count` requests, in the thread that calls: PyTorch is fastest in the main one."""
        waiting: list[tuple[Work, Callable[[], None]]] = []
        while count:
            while not waiting or not self._queue.empty():
                waiting.append(self._queue.get())
            steps = waiting[0][0].num_inference_steps
            batch = [w for w in waiting if w[0].num_inference_steps == steps][: self._max_batch]
            waiting = [w for w in waiting if w not in batch]
            self._peer.draw([work for work, _ in batch])
            for _, done in batch:
                done()
            count -= len(batch)


def run_oneword(stream: Sequence[tuple[float, Work]]) -> dict[str, float]:
    peer = OneWord()
    peer.draw([Work(seed=0)])
    try:
        return replay(stream, to_batcher(peer))
    finally:
        peer.close()


def run_diffusers(stream: Sequence[tuple[float, Work]], max_batch: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        peer = Diffusers(Path(folder))
    peer.draw([Work(seed=0)] * max_batch)
    worker = Worker(peer, max_batch)
    result: dict[str, float] = {}
    feeder = threading.Thread(target=lambda: result.update(replay(stream, worker.send)))
    feeder.start()
    worker.run(len(stream))
    feeder.join()
    return result


SYSTEMS: dict[str, Callable[[Sequence[tuple[float, Work]]], dict[str, float]]] = {
    "OneWord": run_oneword,
    "diffusers, one by one": lambda stream: run_diffusers(stream, 1),
    "diffusers, batches of 8": lambda stream: run_diffusers(stream, 8),
}


def measure(*, alone_ms: float, loads: Sequence[float], count: int) -> dict[str, Any]:
    """Replay one stream per load; a load of 1 is what diffusers can do one image at a time."""
    mean_steps = sum(STEPS) / len(STEPS)
    capacity = 1e3 / (alone_ms * mean_steps / Work(seed=0).num_inference_steps)
    results: dict[str, Any] = {"capacity_images_per_s": capacity, "loads": {}}
    for load in loads:
        results["loads"][f"{load:g}"] = {
            name: _in_process_of_its_own(name, load * capacity, count) for name in SYSTEMS
        }
    return results


def _in_process_of_its_own(name: str, rate: float, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.stream", name, str(rate), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(SYSTEMS[sys.argv[1]](make_stream(float(sys.argv[2]), int(sys.argv[3])))))
