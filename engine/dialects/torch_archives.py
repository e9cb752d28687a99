"""PyTorch's files (`.pt`, `.bin`) read without PyTorch: dictionaries of tensors.

Two containers, as `torch.save` writes them (torch/serialization.py): since PyTorch 1.6 a zip
archive of `data.pkl`, `byteorder` and a stored file `data/KEY` for each storage; before, and on
request, pickles one after the other (magic number, protocol, system, value, storage keys), then
each storage as a count and its bytes. Nothing in the pickles is executed: `inert_pickles`.
"""

import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import cast

import numpy as np

from engine.concepts import MAX_DIM, MAX_FILE_BYTES, MAX_NUM_VECTORS, widened_bfloat16
from engine.dialects.inert_pickles import Builder, Record, Vocabulary, read_pickle
from engine.errors import ConceptUnreadable, quoted

_ZIP_BEGINNING = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LEGACY_BYTE_ORDER = "<"  # on every machine
_MAX_ARCHIVE_FILES = 2000
_MAX_VALUES = MAX_NUM_VECTORS * MAX_DIM
_MAX_AXES = 8
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"

# Classes of storages, the dtype of their values, and for bfloat16 the integers that hold its bits.
_STORAGES = {
    "torch.DoubleStorage": "f8",
    "torch.FloatStorage": "f4",
    "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
_BFLOAT16_BITS = "u2"


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of values that tensors are views of."""

    key: str
    dtype: str  # NumPy's code without byte order, or "bfloat16"
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * np.dtype(self._code).itemsize

    @property
    def _code(self) -> str:
        return _BFLOAT16_BITS if self.dtype == "bfloat16" else self.dtype

    def values(self, content: bytes, byte_order: str) -> np.ndarray:
        """Its values; bfloat16 as the float32 that it abbreviates."""
        array = np.frombuffer(content, np.dtype(byte_order + self._code))
        return widened_bfloat16(array) if self.dtype == "bfloat16" else array


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A tensor as a pickle describes it: a view of a storage, in units of its values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """What a file holds: nested dicts and lists of plain values and `TorchTensor`s."""

    value: object
    storages: Mapping[str, bytes]  # key -> bytes
    byte_order: str  # "<" or ">"

    def array(self, tensor: TorchTensor) -> np.ndarray:
        """The values of a tensor of this file, copied."""
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, np.float32)
        values = tensor.storage.values(self.storages[tensor.storage.key], self.byte_order)
        strides = [
            stride * values.itemsize if size > 1 else 0
            for stride, size in zip(tensor.strides, tensor.shape, strict=True)
        ]
        # Inside the storage: `_check_tensor` has seen to it.
        view = np.lib.stride_tricks.as_strided(
            values[tensor.offset :], tensor.shape, strides, writeable=False
        )
        return view.astype(values.dtype.newbyteorder("="))


def is_torch_archive(content: bytes) -> bool:
    """Whether these bytes begin as a file of `torch.save` does, in either container."""
    # A safetensors file can begin so too, by the length of its header, but has a brace there.
    return content[8:9] != b"{" and (content[:4] == _ZIP_BEGINNING or content[:1] == b"\x80")


def read_torch_archive(content: bytes, *, source: str) -> TorchArchive:
    """Read a file of `torch.save`. Raises `ConceptUnreadable` that names `source` and the fault."""
    if len(content) > MAX_FILE_BYTES:
        raise ConceptUnreadable(
            f"{source} has {len(content)} bytes, a concept file has at most {MAX_FILE_BYTES}"
        )
    try:
        zipped = content[:4] == _ZIP_BEGINNING
        return _read_zip(content) if zipped else _read_legacy(content)
    # What zipfile raises for broken archives; every check of ours raises ValueError.
    except (
        *(ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError),
        *(EOFError, KeyError, IndexError, struct.error, OSError),
    ) as error:
        raise ConceptUnreadable(f"{source} cannot be read as a PyTorch file: {error}") from error


def _read_zip(content: bytes) -> TorchArchive:
    with zipfile.ZipFile(BytesIO(content)) as archive:
        entries = _checked_entries(archive, len(content))
        root = _archive_root(entries)
        declared: dict[str, Storage] = {}
        file = BytesIO(archive.read(entries[f"{root}/data.pkl"]))
        value = read_pickle(file, _vocabulary(declared))
        _refuse_rest(file)
        storages = {
            key: _read_storage(archive, entries, f"{root}/data/{key}", storage)
            for key, storage in declared.items()
        }
        order_entry = entries.get(f"{root}/byteorder")  # absent in older files
        order = archive.read(order_entry) if order_entry else b"little"
    return TorchArchive(value, storages, _byte_order(order))


def _checked_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    entries = {info.filename: info for info in infos}
    if sum(info.file_size for info in infos) > size:
        raise ValueError("the files in its archive overlap")
    if len(infos) > _MAX_ARCHIVE_FILES or len(entries) != len(infos):
        raise ValueError(
            f"its archive has {len(infos)} files, {len(entries)} of them with different names; "
            f"expected are at most {_MAX_ARCHIVE_FILES}, all different"
        )
    for info in infos:
        # torch.save never compresses, so that nothing here can be larger than the file.
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(
                f"{quoted(info.filename)} in it is compressed, which torch.save never does; "
                "save it again with torch.save"
            )
    return entries


def _archive_root(entries: Mapping[str, zipfile.ZipInfo]) -> str:
    roots = [name[: -len("/data.pkl")] for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"its archive has {len(roots)} files data.pkl, PyTorch's has one")
    if f"{roots[0]}/constants.pkl" in entries:
        raise ValueError("it is a TorchScript program, not a file of tensors")
    return roots[0]


def _read_storage(
    archive: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    name: str,
    storage: Storage,
) -> bytes:
    if name not in entries:
        raise ValueError(f"its archive lacks {quoted(name)}; is it truncated?")
    content = archive.read(entries[name])
    if len(content) != storage.nbytes:
        raise ValueError(
            f"{quoted(name)} in it has {len(content)} bytes, its pickle says {storage.nbytes}"
        )
    return content


def _byte_order(name: bytes) -> str:
    if name not in (b"little", b"big"):
        raise ValueError(f"its byte order is {quoted(name[:20].decode('ascii', 'replace'))}")
    return "<" if name == b"little" else ">"


def _read_legacy(content: bytes) -> TorchArchive:
    file = BytesIO(content)
    plain = Vocabulary({}, frozenset(), _refuse_storage)
    if read_pickle(file, plain) != _LEGACY_MAGIC or read_pickle(file, plain) != _LEGACY_PROTOCOL:
        raise ValueError("it is a pickle, and not one that torch.save wrote")
    read_pickle(file, plain)  # byte order and sizes of the system, which PyTorch does not heed
    declared: dict[str, Storage] = {}
    value = read_pickle(file, _vocabulary(declared))
    keys = read_pickle(file, plain)
    texts = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if sorted(texts) != sorted(declared):
        raise ValueError("its list of storages is not that of its tensors")
    storages = {key: _next_storage(file, declared[key]) for key in texts}
    _refuse_rest(file)
    return TorchArchive(value, storages, _LEGACY_BYTE_ORDER)


def _next_storage(file: BytesIO, storage: Storage) -> bytes:
    count_bytes = file.read(8)
    content = file.read(storage.nbytes)
    if len(count_bytes) < 8 or len(content) < storage.nbytes:
        raise ValueError("it ends within its tensors; is it truncated?")
    (count,) = struct.unpack(f"{_LEGACY_BYTE_ORDER}q", count_bytes)
    if count != storage.count:
        raise ValueError(f"a storage in it has {count} values, its pickle says {storage.count}")
    return content


def _refuse_rest(file: BytesIO) -> None:
    rest = len(file.read())
    if rest:
        raise ValueError(f"{rest} bytes follow its end")


def _refuse_storage(_: tuple[object, ...]) -> object:
    raise ValueError("it has a storage where none belongs")


def _vocabulary(declared: dict[str, Storage]) -> Vocabulary:
    """The names in a file of tensors. Storages that it refers to are noted in `declared`."""

    def persistent(identity: tuple[object, ...]) -> object:
        # ("storage", class, key, device, count[, view]), or ("module", class, file, source).
        if len(identity) == 4 and identity[0] == "module":
            return identity[1]
        storage = _storage(identity)
        if declared.setdefault(storage.key, storage) != storage:
            raise ValueError("it describes one storage in two ways")
        return storage

    return Vocabulary(_BUILDERS, frozenset(_STORAGES), persistent)


def _storage(identity: tuple[object, ...]) -> Storage:
    if len(identity) not in (5, 6) or identity[0] != "storage" or identity[5:] not in ((), (None,)):
        raise ValueError("it refers to a storage in an unknown way")
    dtype = _STORAGES.get(getattr(identity[1], "name", ""))
    key, count = identity[2], identity[4]
    if dtype is None or not isinstance(key, str) or not (key.isascii() and key.isdigit()):
        raise ValueError("it refers to a storage by what is not its class and number")
    # The file's size bounds the bytes of a storage later; this bounds the arithmetic.
    if not isinstance(count, int) or not 0 <= count <= MAX_FILE_BYTES:
        raise ValueError("it has a storage whose count of values does not fit the file")
    return Storage(key, dtype, count)


def _rebuild_tensor(arguments: tuple[object, ...]) -> TorchTensor:
    # (storage, offset, shape, strides[, requires_grad, hooks[, metadata]])
    if len(arguments) not in (4, 6, 7) or not isinstance(arguments[0], Storage):
        raise ValueError("it describes a tensor in an unknown way")
    storage, offset, shape, strides = arguments[:4]
    numbers = (
        (offset, *shape, *strides)
        if isinstance(shape, tuple) and isinstance(strides, tuple)
        else (None,)
    )
    if not all(map(_is_count, numbers)):
        raise ValueError("a tensor in it has a shape, strides or an offset below 0 or not whole")
    tensor = TorchTensor(
        cast(Storage, storage),
        cast(int, offset),
        cast("tuple[int, ...]", shape),
        cast("tuple[int, ...]", strides),
    )
    _check_tensor(tensor)
    return tensor


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tensor(tensor: TorchTensor) -> None:
    """All values within the storage, no two of them in the same place, not too many."""
    shape, strides = tensor.shape, tensor.strides
    if (
        len(shape) != len(strides)
        or len(shape) > _MAX_AXES
        or max(math.prod(shape), *shape, 0) > _MAX_VALUES
    ):
        raise ValueError(
            f"a tensor in it has the shape {quoted(str(list(shape[:_MAX_AXES])))} and "
            f"{len(strides)} strides; a concept has at most {MAX_NUM_VECTORS} x {MAX_DIM} values"
        )
    last = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= last:
            raise ValueError(f"a tensor in it has the strides {list(strides)}, which overlap")
        last += stride * max(size - 1, 0)
    used = tensor.offset + (last + 1 if math.prod(shape) else 0)
    if used > tensor.storage.count:
        raise ValueError(
            f"a tensor in it needs {used} values, its storage has {tensor.storage.count}"
        )


def _rebuild_parameter(arguments: tuple[object, ...]) -> TorchTensor:
    if len(arguments) != 3 or not isinstance(arguments[0], TorchTensor):  # data, grad, hooks
        raise ValueError("it describes a parameter in an unknown way")
    return arguments[0]


def _ordered_dict(arguments: tuple[object, ...]) -> dict[object, object]:
    if arguments:
        raise ValueError("it makes an ordered dictionary in an unknown way")
    return {}


_BUILDERS: Mapping[str, Builder] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "collections.OrderedDict": _ordered_dict,
    PARAMETER_DICT: lambda _: Record(PARAMETER_DICT),
    # Of a module's state, which is not looked at.
    "__builtin__.set": lambda _: Record("builtins.set"),
    "builtins.set": lambda _: Record("builtins.set"),
}
