"""Messages between the server and the process of its model: a JSON header, then raw arrays.

No pickle: what a broken or hostile peer sends can be wrong, and it is never executed. Sizes are
checked before memory is taken for them. A frame is

    magic (4 bytes) | bytes of the header (u32) | bytes of the arrays (u64) | header | arrays

all little-endian; the header is {"body": ..., "arrays": [[dtype, shape], ...]}.
"""

import json
import math
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MAX_HEADER_BYTES = 1 << 20
MAX_ARRAYS_BYTES = 1 << 30  # a request's pictures and embeddings are some megabytes
_MAGIC = b"1Wm\x01"
_PREFIX = struct.Struct("<4sIQ")
_DTYPES = {name: np.dtype(name) for name in ("<f4", "<f8", "<i8", "|u1")}


class WireError(Exception):
    """The bytes of the other side are no message, or a message cannot be put into bytes."""


@dataclass(frozen=True, slots=True)
class Message:
    """One request or answer."""

    body: dict[str, Any]  # whatever JSON can hold
    arrays: Sequence[Array] = field(default=())


def send(connection: socket.socket, message: Message, *, timeout_s: float | None = None) -> None:
    """Send a message within `timeout_s`; raises `TimeoutError`, `OSError` or `WireError`."""
    arrays = [_ready(array) for array in message.arrays]
    specs = [[array.dtype.str, array.shape] for array in arrays]
    header = json.dumps({"body": message.body, "arrays": specs}).encode()
    size = sum(array.nbytes for array in arrays)
    _check_sizes(len(header), size)
    connection.settimeout(timeout_s)
    connection.sendall(
        b"".join([_PREFIX.pack(_MAGIC, len(header), size), header, *(a.tobytes() for a in arrays)])
    )


def receive(connection: socket.socket, *, timeout_s: float | None = None) -> Message:
    """The next message, within `timeout_s`.

    Raises `EOFError` where the other side is gone, `TimeoutError`, `OSError` or `WireError`.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    magic, header_size, size = _PREFIX.unpack(_receive_bytes(connection, _PREFIX.size, deadline))
    if magic != _MAGIC:
        raise WireError(f"a message begins with {magic!r}, not {_MAGIC!r}")
    _check_sizes(header_size, size)
    header = _receive_bytes(connection, header_size, deadline)
    content = _receive_bytes(connection, size, deadline)
    return _parse(header, content)


def _ready(array: Array) -> Array:
    if array.dtype.str not in _DTYPES:
        raise WireError(f"an array of {array.dtype} cannot be sent, only {', '.join(_DTYPES)}")
    return np.asarray(array, order="C")


def _check_sizes(header_bytes: int, arrays_bytes: int) -> None:
    for name, value, limit in (
        ("header", header_bytes, MAX_HEADER_BYTES),
        ("arrays", arrays_bytes, MAX_ARRAYS_BYTES),
    ):
        if value > limit:
            raise WireError(f"the {name} of a message has {value} bytes, the limit is {limit}")


def _receive_bytes(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        if deadline is not None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0.0:
                raise TimeoutError
            connection.settimeout(remaining_s)
        else:
            connection.settimeout(None)
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other side is gone")
        view = view[count:]
    return content


def _parse(header: bytearray, content: bytearray) -> Message:
    try:
        fields = json.loads(header)
        body, specs = fields["body"], fields["arrays"]
        if not isinstance(body, dict):
            raise WireError(f"the body of a message is {type(body).__name__}, not an object")
        arrays: list[Array] = []
        start = 0
        for name, shape in specs:
            array = _view(content, start, _DTYPES[name], shape)
            arrays.append(array)
            start += array.nbytes
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"the header of a message cannot be read: {error!r}") from error
    if start != len(content):
        raise WireError(f"a message has {len(content)} bytes of arrays, its header says {start}")
    return Message(body, arrays)


def _view(content: bytearray, start: int, dtype: np.dtype[Any], shape: list[Any]) -> Array:
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise WireError(f"an array of shape {shape} is not possible")
    # frombuffer checks that the content has as much. Copied, so that an array is aligned and does
    # not keep the others of its message alive.
    return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape).copy()
