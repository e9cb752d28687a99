"""A stream of images at random arrival: every system gets the same requests at the same times."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.peers import Diffusers, OneWord, Work
from engine.batcher import Event, Failed, Finished

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
    """diffusers behind a queue: one thread that takes what waits, alone or in batches.

    A diffusers call has one step count for its batch, so only equal ones can be joined.
    """

    def __init__(self, peer: Diffusers, max_batch: int) -> None:
        self._peer = peer
        self._max_batch = max_batch
        self._queue: queue.Queue[tuple[Work, Callable[[], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, work: Work, done: Callable[[], None]) -> None:
        self._queue.put((work, done))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        waiting: list[tuple[Work, Callable[[], None]]] = []
        while True:
            while not waiting or not self._queue.empty():
                if (item := self._queue.get()) is None:
                    return
                waiting.append(item)
            steps = waiting[0][0].num_inference_steps
            batch = [w for w in waiting if w[0].num_inference_steps == steps][: self._max_batch]
            waiting = [w for w in waiting if w not in batch]
            self._peer.draw([work for work, _ in batch])
            for _, done in batch:
                done()


def measure(
    oneword: OneWord, diffusers: Diffusers, *, alone_ms: float, loads: Sequence[float], count: int
) -> dict[str, Any]:
    """Replay one stream per load; a load of 1 is what diffusers can do one image at a time."""
    mean_steps = sum(STEPS) / len(STEPS)
    capacity = 1e3 / (alone_ms * mean_steps / Work(seed=0).num_inference_steps)
    results: dict[str, Any] = {"capacity_images_per_s": capacity, "loads": {}}
    for load in loads:
        stream = make_stream(load * capacity, count)
        row: dict[str, Any] = {"oneword": replay(stream, to_batcher(oneword))}
        for name, max_batch in (("diffusers, one by one", 1), ("diffusers, batches of 8", 8)):
            worker = Worker(diffusers, max_batch)
            row[name] = replay(stream, worker.send)
            worker.close()
        results["loads"][f"{load:g}"] = row
    return results
