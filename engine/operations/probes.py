"""A small HTTP port beside gRPC, for Prometheus and for probes that have no TLS.

    GET /metrics    what is counted
    GET /healthz    200 while the event loop turns: restart the process otherwise
    GET /readyz     200 while the server serves, else 503: send it no calls

It says how much is done and nothing of what or for whom; it takes nothing but a path. On the event
loop on purpose: a loop that is stuck must not look alive.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.operations.config import split_address

_HEAD_BYTES = 8 << 10
_TIMEOUT_S = 5.0
_CONNECTIONS = 32
_PLAIN = "text/plain; charset=utf-8"
_REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """An answer."""

    status: int
    body: bytes
    content_type: str = _PLAIN


class Probes:
    """The HTTP port, from `start` to `stop`."""

    def __init__(
        self,
        listen: str,
        *,
        serving: Callable[[], dict[str, bool]],
        metrics: Callable[[str], tuple[bytes, str]] | None,
    ) -> None:
        """`metrics` gets the Accept header and returns a body and its type; it runs in a thread."""
        self._listen = listen
        self._serving = serving
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self) -> str:
        """Listen; returns the address with the port that was bound. Raises `ConfigError`."""
        host, port = split_address(self._listen)
        try:
            self._server = await asyncio.start_server(self._answer, host, port, limit=_HEAD_BYTES)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self._listen} for metrics_listen: {error.strerror or error}; "
                "stop what listens there, or choose another port (0: any free one)"
            ) from error
        name = self._server.sockets[0].getsockname()
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= _CONNECTIONS:
                async with asyncio.timeout(_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(_response(await self._page(head.decode("latin-1"))))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a caller that is no probe, or that went away: nothing is owed to it
        finally:
            self._open -= 1
            writer.close()

    async def _page(self, head: str) -> Page:
        request, *headers = head.split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method != "GET":
            return Page(status=405, body=b"only GET\n")
        if path == "/healthz":
            return Page(status=200, body=b"ok\n")
        if path == "/readyz":
            return self._ready()
        if path == "/metrics" and self._metrics is not None:
            body, content_type = await asyncio.to_thread(self._metrics, _accept(headers))
            return Page(status=200, body=body, content_type=content_type)
        return Page(status=404, body=b"there are /metrics, /healthz and /readyz\n")

    def _ready(self) -> Page:
        serving = self._serving()
        lines = [
            f"{name or 'server'}: {'serving' if serves else 'not serving'}\n"
            for name, serves in serving.items()
        ]
        return Page(status=200 if serving.get("") else 503, body="".join(lines).encode())


def _accept(headers: list[str]) -> str:
    for header in headers:
        name, _, value = header.partition(":")
        if name.strip().lower() == "accept":
            return value.strip()
    return ""


def _response(page: Page) -> bytes:
    head = (
        f"HTTP/1.1 {page.status} {_REASONS[page.status]}\r\n"
        f"Content-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + page.body
