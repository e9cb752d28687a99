"""Below gRPC: connections, frames and headers that no client library would send."""

import asyncio
import functools
import gzip
import random
import ssl
import struct
from contextlib import suppress

from tests.soak import http2
from tests.soak.attacks.registry import attack
from tests.soak.field import GENERATE, HEALTH, INFO, Field
from tests.soak.http2 import Wire, connected, frame, message, opened

_HOLD_S = 1.5


def _odd(count: int, start: int = 1) -> range:
    """Ids of streams that a client opens."""
    return range(start, start + 2 * count, 2)


def _requests(field: Field, stream: int, content: bytes, *, path: str = GENERATE) -> bytes:
    """A whole call with one message."""
    begin = opened(stream, path, token=field.intruder.token)
    return begin + frame(http2.DATA, http2.END_STREAM, stream, message(content))


async def _hold(field: Field, chance: random.Random, *parts: bytes, plain: bool = False) -> None:
    """Connect, send something, and say nothing more."""
    authority = None if plain else field.server.place.authority
    with suppress(OSError, ssl.SSLError):
        async with connected(field.server.address, authority, preface=not plain) as wire:
            await wire.send(*parts)
            await wire.read_for(_HOLD_S * (0.5 + chance.random()))


@attack(8)
async def slow_connections(field: Field, chance: random.Random) -> None:
    """Many connections that stop in the middle of something."""
    hello = bytes([22, 3, 1, 2, 0, 1])  # the beginning of a TLS handshake
    async with asyncio.TaskGroup() as group:
        for _ in range(30):
            part = chance.choice([b"", hello, b"PRI * HT", b"GET / HTTP/1.1\r\n"])
            group.create_task(_hold(field, chance, part, plain=True))
        for stream in _odd(10):
            half = opened(stream, GENERATE, token=field.intruder.token)[: chance.randrange(9, 60)]
            group.create_task(_hold(field, chance, half))


@attack(8)
async def half_messages(field: Field, chance: random.Random) -> None:
    """Calls whose message never ends, or ends too soon."""
    content = field.draw().SerializeToString()
    calls: list[bytes] = []
    for stream in _odd(50):
        begin = opened(stream, GENERATE, token=field.intruder.token)
        lie = chance.choice([1 << 31, (1 << 32) - 1, len(content) + 1, 16 << 20])
        part = message(content, length=lie)
        calls += [begin, frame(http2.DATA, chance.choice([0, http2.END_STREAM]), stream, part)]
    await _hold(field, chance, *calls)


@attack(8)
async def garbage(field: Field, chance: random.Random) -> None:
    """Bytes that mean nothing, before TLS, within it, and after a preface."""
    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            noise = chance.randbytes(chance.randrange(1, 5000))
            group.create_task(_hold(field, chance, noise, plain=True))
            group.create_task(_hold(field, chance, noise))
        group.create_task(_hold(field, chance, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", plain=True))


@attack(8)
async def broken_frames(field: Field, chance: random.Random) -> None:
    """Frames against the rules, each on a connection of its own."""
    begin = opened(1, GENERATE, token=field.intruder.token)
    parts = [
        frame(http2.DATA, 0, 0, b"x"),  # on the connection
        frame(http2.DATA, 0, 7, b"x"),  # of a stream that was never opened
        frame(http2.HEADERS, http2.END_HEADERS, 2, b""),  # an even one
        frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff\xff\xff\xff\x7f"),  # no such header
        frame(http2.HEADERS, http2.END_HEADERS, 1, b"\x10\x7f\xff\xff\xff\xff\xff\x0f"),
        b"\xff\xff\xff" + frame(http2.DATA)[3:],  # 16 MiB that never come
        frame(77, 255, 12345, b"unknown"),
        frame(http2.SETTINGS, 0, 0, b"123"),
        frame(http2.SETTINGS, 0, 3, b""),
        http2.settings(s4=(1 << 32) - 1, s5=1),
        frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 0)),
        begin + frame(http2.WINDOW_UPDATE, 0, 1, struct.pack(">I", (1 << 31) - 1)) * 3,
        frame(http2.PUSH_PROMISE, 0, 1, b"\0\0\0\2"),
        frame(http2.GOAWAY, 0, 0, b"\0" * 8) + begin,
        frame(http2.CONTINUATION, 0, 1, b""),
        begin + begin,
        frame(http2.PING, 0, 0, b"short"),
        frame(http2.RST_STREAM, 0, 9, b"\0\0\0\0"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",  # twice
    ]
    chance.shuffle(parts)
    async with asyncio.TaskGroup() as group:
        for part in parts:
            group.create_task(_hold(field, chance, part))


@attack(8, 11)
async def endless_headers(field: Field, chance: random.Random) -> None:
    """Header blocks that go on and on, and ones that unfold."""
    piece = frame(http2.CONTINUATION, 0, 1, http2.header_block(("x-a", b"a" * 8000)))
    begin = frame(http2.HEADERS, 0, 1, http2.header_block(*http2.request_headers(GENERATE)))
    await _hold(field, chance, begin, *[piece] * 300)
    stored = http2.indexed_later("x-bomb", b"b" * 3900)
    bomb = stored + b"\xbe" * 8000  # 30 MB by one byte for each 4 KB
    await _hold(field, chance, frame(http2.HEADERS, http2.END_HEADERS, 1, bomb))


@attack(9)
async def rapid_reset(field: Field, chance: random.Random) -> None:
    """Calls that are given up in the same breath, by the thousand (CVE-2023-44487)."""
    authority = field.server.place.authority
    reset = struct.pack(">I", http2.CANCEL)
    content = field.draw(num_inference_steps=100).SerializeToString()
    with field.ledger.flood(), suppress(OSError, ssl.SSLError):
        async with connected(field.server.address, authority) as wire:
            for first in range(1, 4000, 200):
                calls: list[bytes] = []
                for stream in _odd(100, first):
                    whole = chance.random() < 0.5
                    calls.append(
                        _requests(field, stream, content)
                        if whole
                        else opened(stream, GENERATE, token=field.intruder.token)
                    )
                    calls.append(frame(http2.RST_STREAM, 0, stream, reset))
                await wire.send(*calls)
                field.ledger.given_up += 100
            await wire.read_for(_HOLD_S)


@attack(8, 9)
async def frame_floods(field: Field, chance: random.Random) -> None:
    """Thousands of frames that cost the sender nothing and want an answer or a place."""
    floods = [
        frame(http2.PING, 0, 0, b"12345678"),
        frame(http2.SETTINGS),
        http2.settings(s4=1),
        frame(http2.PRIORITY, 0, 1, b"\0\0\0\3\1"),
        frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
    ]
    async with asyncio.TaskGroup() as group:
        for part in floods:
            group.create_task(_hold(field, chance, *[part] * 3000))
        begin = opened(1, GENERATE, token=field.intruder.token)
        empty = frame(http2.DATA, 0, 1)
        group.create_task(_hold(field, chance, begin, *[empty] * 3000))


@attack(8)
async def closed_windows(field: Field, chance: random.Random) -> None:
    """Images with previews for a caller whose window is one byte, and stays so."""
    content = field.draw(
        num_images=8, num_inference_steps=12, preview_every_steps=1
    ).SerializeToString()
    authority = field.server.place.authority
    with suppress(OSError, ssl.SSLError):
        async with connected(field.server.address, authority) as wire:
            await wire.send(http2.settings(s4=chance.choice([0, 1])))
            await wire.send(*(_requests(field, stream, content) for stream in _odd(6)))
            await wire.read_for(2 * _HOLD_S)


@attack(8, 10)
async def vanishing_clients(field: Field, chance: random.Random) -> None:
    """Callers that end like killed processes: a TCP reset with calls under way."""
    content = field.draw(num_images=4, num_inference_steps=50).SerializeToString()
    authority = field.server.place.authority

    async def vanish() -> None:
        with suppress(OSError, ssl.SSLError):
            async with connected(field.server.address, authority) as wire:
                await wire.send(*(_requests(field, stream, content) for stream in _odd(4)))
                await wire.read_for(chance.random() * 0.5)
                wire.reset()

    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(vanish())


@attack(10)
async def absurd_deadlines(field: Field, chance: random.Random) -> None:
    """`grpc-timeout` as it cannot be: centuries, nothing, text."""
    content = field.draw().SerializeToString()
    values = ["99999999H", "0n", "0S", "-1S", "1", "", "S", "999999999999H", "1e9S", "\u0661S"]
    async with asyncio.TaskGroup() as group:
        for value in values:
            begin = opened(1, GENERATE, ("grpc-timeout", value), token=field.intruder.token)
            data = frame(http2.DATA, http2.END_STREAM, 1, message(content))
            group.create_task(_hold(field, chance, begin, data))


@attack(11)
async def strange_paths(field: Field, chance: random.Random) -> None:
    """Ways around the gate: other methods, paths, schemes and content types, without a token."""
    odd = [
        (("content-type", "application/json"),),
        (("content-type", "application/grpc-web"),),
        (("authorization", b"Bearer \xff\xfe"),),
        (("authorization", "Bearer"), ("authorization", "Bearer")),
        (("x-request-id", b"a\r\nERROR forged\x1b[2J"),),
        (("traceparent", "00-" + "f" * 32 + "-zz"),),
    ]
    paths = ["/", "//", GENERATE + "/", GENERATE.lower(), "*", "/" + "a" * 9000, HEALTH + "Check\0",
             "/grpc.channelz.v1.Channelz/GetServers", "https://localhost" + INFO]  # fmt: skip
    calls = [opened(stream, path, flags=http2.END_STREAM) for stream, path in zip(
        _odd(len(paths)), paths, strict=True)]  # fmt: skip
    calls += [
        opened(stream, INFO, *more, flags=http2.END_STREAM)
        for stream, more in zip(_odd(len(odd), 101), odd, strict=True)
    ]
    get = http2.header_block((":method", "GET"), *http2.request_headers(INFO)[1:])
    calls.append(frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 201, get))
    chance.shuffle(calls)
    async with asyncio.TaskGroup() as group:
        for call in calls:  # ids of streams only grow, so each on a connection
            group.create_task(_hold(field, chance, call))


@attack(18)
async def compressed_bombs(field: Field, chance: random.Random) -> None:
    """Messages of some kilobytes that unfold to many megabytes, or are no gzip at all."""
    bomb = _bomb()
    begin = [
        opened(stream, GENERATE, ("grpc-encoding", encoding), token=field.intruder.token)
        for stream, encoding in zip(_odd(4), ("gzip", "gzip", "deflate", "brotli"), strict=True)
    ]
    bodies = [message(bomb, compressed=True), message(b"no gzip", compressed=True),
              message(bomb[:1000], compressed=True), message(b"x", compressed=True)]  # fmt: skip
    for stream, first, body in zip(_odd(4), begin, bodies, strict=True):
        pieces = [body[at : at + 16_000] for at in range(0, len(body), 16_000)]
        data = [frame(http2.DATA, 0, stream, piece) for piece in pieces]
        await _hold(field, chance, first, *data[:4])  # the window takes 64 KiB at first
        async with connected(field.server.address, field.server.place.authority) as wire:
            await _send_slowly(wire, first, data)


@functools.cache
def _bomb() -> bytes:
    """64 KB that become 64 MiB."""
    return gzip.compress(bytes(64 << 20), 9)


async def _send_slowly(wire: Wire, begin: bytes, data: list[bytes]) -> None:
    """Within the window, as a server that reads opens it."""
    await wire.send(begin)
    for first in range(0, len(data), 3):
        await wire.send(*data[first : first + 3])
        await wire.read_for(0.05)
