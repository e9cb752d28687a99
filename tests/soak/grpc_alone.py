"""`python -m tests.soak.grpc_alone`: what gRPC itself loses with each call that is given up.

A server that has nothing but gRPC in it, and calls that are reset in the same breath, as in the
attack `rapid_reset`. 50 bytes a call with grpcio 1.85.1 (https://github.com/grpc/grpc/issues/43360);
where it says 0, `LOST_BY_GRPC` in judge.py can go.
"""

import asyncio
import gc
import os
import struct
import sys
from typing import Any

import grpc
import grpc.aio

from benchmarks.live_heap import live_heap_bytes
from tests.soak import http2
from tests.soak.http2 import connected, frame, opened
from tests.soak.process import HEAP_TELLS

METHOD = "/alone.Alone/Wait"
CONNECTIONS, CALLS = 5, 2000
ROUNDS = 4


async def main() -> None:
    server = grpc.aio.server(options=[("grpc.max_concurrent_streams", 1000)])
    handler = grpc.unary_stream_rpc_method_handler(_wait)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("alone.Alone", {"Wait": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    for number in range(ROUNDS):
        before = _live()
        for _ in range(CONNECTIONS):
            await _reset_many(f"127.0.0.1:{port}")
        await asyncio.sleep(0.5)
        lost = (_live() - before) / (CONNECTIONS * CALLS)
        print(f"round {number}: {lost:.1f} bytes a call")
    await server.stop(0)


async def _wait(request: bytes, context: Any) -> None:
    await asyncio.sleep(10.0)


async def _reset_many(address: str) -> None:
    reset = struct.pack(">I", http2.CANCEL)
    async with connected(address, None) as wire:
        for first in range(1, 2 * CALLS, 200):
            streams = range(first, first + 200, 2)
            await wire.send(
                *(opened(one, METHOD) + frame(http2.RST_STREAM, 0, one, reset) for one in streams)
            )
        await wire.read_for(0.5)


def _live() -> int:
    gc.collect()
    found = live_heap_bytes()
    assert found is not None, "the C library does not tell what lives"
    return found


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in HEAP_TELLS.items()):
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.soak.grpc_alone"], os.environ | HEAP_TELLS
        )
    asyncio.run(main())
