"""HTTP/2 by hand: frames that no gRPC client would send, over the server's TLS."""

import asyncio
import random
import socket
import ssl
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
CONTINUATION = 9
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 4
CANCEL = 8
_READ_BYTES = 1 << 16


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """`settings(s4=0)` sets number 4 to 0."""
    body = b"".join(struct.pack(">HI", int(name[1:]), value) for name, value in values.items())
    return frame(SETTINGS, payload=body)


def header_block(*headers: tuple[str, str | bytes]) -> bytes:
    """HPACK without its tricks: literals that are never indexed."""
    return b"".join(b"\x10" + _text(name) + _text(value) for name, value in headers)


def indexed_later(name: str, value: bytes) -> bytes:
    """A literal that goes into the receiver's table, to be referred to by one byte."""
    return b"\x40" + _text(name) + _text(value)


def _text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return _number(len(content), 7) + content


def _number(value: int, bits: int) -> bytes:
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([value])
    out, value = [limit], value - limit
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def request_headers(
    path: str, *more: tuple[str, str | bytes], token: str = ""
) -> tuple[tuple[str, str | bytes], ...]:
    """The headers of a gRPC call."""
    return (
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *((("authorization", f"Bearer {token}"),) if token else ()),
        *more,
    )


def opened(
    stream: int, path: str, *more: tuple[str, str | bytes], token: str = "", flags: int = 0
) -> bytes:
    """The frame that begins a call."""
    block = header_block(*request_headers(path, *more, token=token))
    return frame(HEADERS, END_HEADERS | flags, stream, block)


def message(content: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """A gRPC message, which may lie about its length."""
    size = len(content) if length is None else length
    return struct.pack(">BI", compressed, size) + content


class Wire:
    """One connection; what the server sends is read and dropped, unless nobody is to read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.num_received = 0

    async def send(self, *parts: bytes) -> None:
        """Send; the server may have hung up already, which is its good right."""
        with suppress(OSError, asyncio.IncompleteReadError):
            self._writer.write(b"".join(parts))
            async with asyncio.timeout(5.0):  # a server that reads no more must not hold us
                await self._writer.drain()

    async def read_for(self, seconds: float) -> bytes:
        """What comes within a time, or until the server hangs up."""
        content = b""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(seconds):
                while part := await self._reader.read(_READ_BYTES):
                    content += part
                    self.num_received += len(part)
        return content

    async def until_end_of(self, stream: int) -> list[int]:
        """Read frames until the server has ended a stream; returns the kinds that came for it."""
        kinds = list[int]()
        while True:
            head = await self._reader.readexactly(9)
            kind, flags, number = struct.unpack(">BBI", head[3:])
            await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            if number == stream:
                kinds.append(kind)
                if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
                    return kinds

    def reset(self) -> None:
        """Vanish with a TCP reset, as a process that is killed with data unread."""
        sock = self._writer.get_extra_info("socket")
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._abort()

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError, TimeoutError, ssl.SSLError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()
        self._abort()  # TLS waits half a minute for data that nobody reads

    def _abort(self) -> None:
        with suppress(AttributeError):  # asyncio's, in Python 3.11.2, where the connection is gone
            self._writer.transport.abort()


@asynccontextmanager
async def connected(
    address: str, authority: Path | None, *, preface: bool = True
) -> AsyncGenerator[Wire]:
    """A connection to the server: TLS with h2, or plain bytes where `authority` is None."""
    host, _, port = address.rpartition(":")
    context = None
    if authority is not None:
        context = ssl.create_default_context(cafile=str(authority))
        context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(
        host, int(port), ssl=context, server_hostname="localhost" if context else None
    )
    wire = Wire(reader, writer)
    try:
        if preface:
            await wire.send(PREFACE, settings())
        yield wire
    finally:
        await wire.close()


def noise(chance: random.Random, size: int) -> bytes:
    return chance.randbytes(size)
