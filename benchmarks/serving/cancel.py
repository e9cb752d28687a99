"""From a caller's cancel to a free slot, in milliseconds and in denoiser calls, through gRPC.

A running request is cancelled at a random moment. The server's probe tells, on the same clock, when
the batcher heard of it, when it let go of the image, and which calls of the model that was in.
Alone, and beside others.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.serving.background import busy
from benchmarks.serving.server_process import RunningServer, running_server
from benchmarks.serving.settings import Settings
from benchmarks.serving.spread import spread
from protos.oneword.v1.generation_pb2 import GenerateRequest

STEPS = 50
OTHERS, OTHERS_STEPS = 3, 20
SETTLE_S = 0.15  # between two of them

ModelCall = tuple[str, float, float, list[int]]  # what, begin, end, seeds


def measure(settings: Settings) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), probed=True, bundle=settings.bundle) as server,
    ):
        alone_s = _draw_one(server)
        alone = _cancel_many(server, settings.cancels, alone_s, "cancel, alone")
        with busy(server, OTHERS, num_inference_steps=OTHERS_STEPS):
            beside = _cancel_many(server, settings.cancels, alone_s, "cancel, beside others")
    return {"steps": STEPS, "others": OTHERS, "alone": alone, "beside_others": beside}


def _draw_one(server: RunningServer) -> float:
    """Seconds of a request that is not cancelled; the second one, when all is warm."""
    for _ in range(2):
        started = time.monotonic()
        for _ in server.generation.Generate(_request(0)):
            pass
    return time.monotonic() - started  # pyright: ignore[reportPossiblyUnboundVariable]


def _request(seed: int) -> GenerateRequest:
    return GenerateRequest(prompt="a photo of a cat", seed=seed, num_inference_steps=STEPS)


def _cancel_many(server: RunningServer, count: int, alone_s: float, title: str) -> dict[str, Any]:
    server.ask("calls")
    moments, chance = dict[int, float](), random.Random(0)
    for seed in tqdm(range(1, count + 1), desc=title, unit="request"):
        call = server.generation.Generate(_request(seed))
        for event in call:
            if event.HasField("progress"):
                break
        time.sleep(chance.uniform(0.0, 0.8 * alone_s))
        moments[seed] = time.monotonic()
        call.cancel()
        time.sleep(SETTLE_S)
    return summary(moments, server.ask("calls"))


def summary(moments: dict[int, float], calls: Sequence[ModelCall]) -> dict[str, Any]:
    """What the model was called for after each cancel; `moments` are those of the cancels."""
    free_ms, heard_ms, free_steps, all_steps, later = (list[float]() for _ in range(5))
    step_ms = statistics.median(
        1e3 * (end - begin) for what, begin, end, _ in calls if what == "step"
    )
    for seed, cancelled in moments.items():
        mine = [call for call in calls if seed in call[3]]
        released = [begin for what, begin, _, _ in mine if what == "release"]
        if not released:
            continue  # it was done before the cancel came
        free_ms.append(1e3 * (released[0] - cancelled))
        holds = [begin for what, begin, _, _ in calls if what == "hold" and begin >= cancelled]
        heard = min(holds, default=cancelled)  # or sooner: beside others it may be one of theirs
        heard_ms.append(1e3 * (heard - cancelled))
        # Calls that ended while it waited, whoever was in them: a slot is given away between calls.
        for since, found in ((heard, free_steps), (cancelled, all_steps)):
            found.append(
                sum(
                    what == "step" and since < end and begin < released[0]
                    for what, begin, end, _ in calls
                )
            )
        later.append(sum(what == "step" and begin > heard for what, begin, _, _ in mine))
    return {
        "cancelled": len(free_ms),
        "done_before": len(moments) - len(free_ms),
        "median_step_ms": step_ms,
        "heard_ms": spread(heard_ms),
        "slot_free_ms": spread(free_ms),
        "calls_until_free": spread(free_steps),
        "calls_since_cancel": spread(all_steps),
        "calls_begun_with_it_afterwards": spread(later),
    }
