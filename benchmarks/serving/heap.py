"""Whether the server's memory grows with the requests that it has served.

The server is a process of its own with PYTHONMALLOC=malloc, so that one counter (glibc's mallinfo2)
sees all that is alive in it: Python's objects, gRPC's, numpy's. It is read when no call is under
way, after a collection of garbage. The slope is that of a line through the second half of the
samples; it is zero within noise if two standard errors reach zero. Of the model's process, which
has an allocator of its own, the resident memory is measured.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
from tqdm import tqdm

from benchmarks.serving.heap_traffic import Traffic
from benchmarks.serving.mix import make_concepts
from benchmarks.serving.server_process import RunningServer, running_server
from benchmarks.serving.settings import Settings
from benchmarks.serving.spread import fit_line
from engine.bundle import read_manifest
from engine.concepts import Concept

MAX_MESSAGE_BYTES = 1 << 20  # of this server: smaller messages are too large, so they cost less
ENVIRONMENT = {"PYTHONMALLOC": "malloc"}
MEASURES = ("heap_bytes", "resident_bytes", "model_resident_bytes")


def measure(settings: Settings) -> dict[str, Any]:
    concept, *_ = make_concepts(read_manifest(settings.bundle).text.dim).values()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(
            Path(folder),
            probed=True,
            environment=ENVIRONMENT,
            bundle=settings.bundle,
            max_message_bytes=MAX_MESSAGE_BYTES,
        ) as server,
    ):
        samples, codes = asyncio.run(_sample(server, concept, settings))
    return {
        "requests": settings.heap_requests,
        "codes": dict(sorted(codes.items())),
        "samples": samples,
        "slopes": {
            name: _slope(samples, name) for name in MEASURES if samples[0][name] is not None
        },
    }


async def _sample(
    server: RunningServer, concept: Concept, settings: Settings
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Memory by the number of requests so far, and how these ended."""
    samples = list[dict[str, Any]]()
    share = settings.heap_requests // settings.heap_samples
    async with grpc.aio.insecure_channel(server.address) as channel:
        traffic = Traffic(channel, concept, MAX_MESSAGE_BYTES)
        with tqdm(total=settings.heap_requests, desc="heap", unit="request") as bar:
            for number in range(1, settings.heap_samples + 1):
                await traffic.send(share)
                memory = await asyncio.to_thread(server.ask, "memory")
                samples.append({"requests": number * share, **memory})
                bar.update(share)
    return samples, traffic.codes


def _slope(samples: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    half = samples[len(samples) // 2 :]
    line = fit_line([one["requests"] for one in half], [one[name] for one in half])
    return {
        "bytes_per_request": line.slope,
        "standard_error": line.slope_error,
        "is_flat": line.is_flat,
        "first_bytes": samples[0][name],
        "last_bytes": samples[-1][name],
    }
