"""More calls than gRPC has room for, while nobody has time to look at them.

gRPC has a queue of its own in front of the server, and drops calls of anybody when it is full. To
fill it at will, the test holds the server's event loop, as a long garbage collection would.
"""

import asyncio
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from engine.client.calls import Stubs
from engine.client.retries import RetryPolicy
from protos.oneword.v1 import server_info_pb2
from protos.oneword.v1.server_info_pb2 import GetServerInfoRequest
from tests import service_harness
from tests.client_setup import FakeTime, answer, calling, fail
from tests.fakes import WAIT_S
from tests.service_harness import Harness
from tests.soak import http2
from tests.soak.field import GENERATE
from tests.test_client_retries import Serve
from tests.test_client_retries import kind as kind
from tests.test_client_retries import serve as serve

# Fixtures.
start_server, served = service_harness.start_server, service_harness.served

NUM_HONEST = 40
NUM_CALLS = 4000  # of each connection that attacks
HELD_S = 1.5


@contextmanager
def attacking(address: str, *, reset: bool) -> Generator[None]:
    """A connection with thousands of calls that begin, and are perhaps given up at once."""
    host, _, port = address.rpartition(":")
    cancel = struct.pack(">I", http2.CANCEL)
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        answering = threading.Thread(target=_answer_pings, args=(connection,))
        answering.start()
        parts = [http2.PREFACE, http2.settings()]
        for stream in range(1, 2 * NUM_CALLS, 2):
            parts.append(http2.opened(stream, GENERATE))
            if reset:
                parts.append(http2.frame(http2.RST_STREAM, 0, stream, cancel))
        with suppress(OSError):  # a server that hangs up has its reasons
            connection.sendall(b"".join(parts))
        yield
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        answering.join()


def _answer_pings(connection: socket.socket) -> None:
    """A server reads no more resets while it waits for an answer to a ping."""
    with suppress(OSError), connection.makefile("rb") as file:
        while len(head := file.read(9)) == 9:
            body = file.read(int.from_bytes(head[:3], "big"))
            if head[3] == http2.PING and not head[4] & http2.ACK:
                connection.sendall(http2.frame(http2.PING, http2.ACK, 0, body))


def _fates_in_flood(address: str, *, reset: bool) -> Counter[StatusCode]:
    """What becomes of honest calls, each on a connection of its own, behind four attackers."""
    fates: Counter[StatusCode] = Counter()
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(attacking(address, reset=reset))
        time.sleep(HELD_S / 3)  # for the server to read it
        channels = [
            stack.enter_context(
                grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
            )
            for _ in range(NUM_HONEST)
        ]
        calls: list[Any] = [
            Stubs(channel).server_info.GetServerInfo.future(GetServerInfoRequest(), timeout=WAIT_S)
            for channel in channels
        ]
        for call in calls:
            fates[StatusCode.OK if call.exception() is None else call.code()] += 1
    return fates


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "open"])
async def test_a_flood_drops_no_call_of_others(served: Harness, reset: bool) -> None:
    flood = asyncio.create_task(asyncio.to_thread(_fates_in_flood, served.address, reset=reset))
    await asyncio.sleep(0.05)  # the thread is there
    time.sleep(HELD_S)
    fates = await flood
    # Calls that stay open are too many at once for the server: it says so, and they may come again.
    allowed = {StatusCode.OK} if reset else {StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED}
    assert set(fates) <= allowed and sum(fates.values()) == NUM_HONEST, fates
    answers = await served.generate(seed=1)
    assert answers[-1].HasField("summary")


INFO = answer(server_info_pb2.GetServerInfoResponse())


@pytest.mark.parametrize(
    ("text", "num_calls"),
    [
        ("CANCELLED", 2),  # all that gRPC says of a call that its queue had no room for
        ("nothing was read for 60 s; the request was dropped", 1),
    ],
)
async def test_a_call_that_was_dropped_unseen_is_repeated(
    kind: str, serve: Serve, text: str, num_calls: int
) -> None:
    server, fake = serve(GetServerInfo=[fail(StatusCode.CANCELLED, text), INFO]), FakeTime()
    policy = RetryPolicy(max_attempts=3)
    async with calling(kind, server.address, fake=fake, retry=policy) as caller:
        if num_calls == 2:
            await caller.call(lambda client: client.server_info())
        else:
            with pytest.raises(Exception, match="nothing was read"):
                await caller.call(lambda client: client.server_info())
    assert len(server.requests("GetServerInfo")) == num_calls
