"""Files that `torch.load(path, weights_only=True)` reads, written without PyTorch.

The zip archive of `torch.save` (torch/serialization.py, format version 3) with a pickle of protocol
2 put together from its opcodes; without a pickler, only what is listed here can be written.
"""

import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO

import numpy as np
from jaxtyping import Float32

_ROOT = "archive"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date of a zip archive: the same content, the same bytes
_REBUILD_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
_FLOAT_STORAGE = b"ctorch\nFloatStorage\n"
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def torch_archive(value: Mapping[str, object]) -> bytes:
    """The bytes of a PyTorch file that holds a dictionary, always the same.

    Its values are None, integers, text, float32 arrays, and dictionaries of such.
    """
    storages: list[bytes] = []
    pickle = b"\x80\x02" + _pickled(value, storages) + b"."
    files = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    files |= {f"data/{key}": content for key, content in enumerate(storages)}
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}", _EPOCH), content)
    return buffer.getvalue()


def _pickled(value: object, storages: list[bytes]) -> bytes:
    """Opcodes that leave `value` on the stack; bytes of tensors are added to `storages`."""
    if value is None:
        return b"N"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, np.ndarray):
        return _tensor(value, storages)
    assert isinstance(value, Mapping)
    items = b"".join(_text(key) + _pickled(item, storages) for key, item in value.items())
    return b"}(" + items + b"u"


def _integer(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(content)) + content


def _text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def _tensor(array: Float32[np.ndarray, "..."], storages: list[bytes]) -> bytes:
    """A call of `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    storages.append(np.ascontiguousarray(array, "<f4").tobytes())
    identity = _text("storage") + _FLOAT_STORAGE + _text(str(len(storages) - 1)) + _text("cpu")
    storage = b"(" + identity + _integer(array.size) + b"tQ"
    strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
    shape = b"(" + b"".join(map(_integer, array.shape)) + b"t"
    steps = b"(" + b"".join(map(_integer, strides)) + b"t"
    arguments = storage + _integer(0) + shape + steps + b"\x89" + _ORDERED_DICT
    return _REBUILD_TENSOR + b"(" + arguments + b"tR"
