"""PyTorch's files: values as PyTorch wrote them, and nothing that a file says is ever done."""

import collections
import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.concepts import concept_from_bytes
from engine.dialects.inert_pickles import Record
from engine.dialects.torch_archive_writer import torch_archive
from engine.dialects.torch_archives import (
    TorchArchive,
    TorchTensor,
    is_torch_archive,
    read_torch_archive,
)
from engine.errors import ConceptUnreadable

VALUES = torch.linspace(-1, 1, 12).reshape(2, 6)
both_containers = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(value: object, zipped: bool = True, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(
        value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
    )  # fmt: skip
    return buffer.getvalue()


def read(content: bytes) -> TorchArchive:
    return read_torch_archive(content, source="test")


def arrays(content: bytes) -> dict[str, np.ndarray]:
    archive = read(content)
    assert isinstance(archive.value, dict)
    return {key: archive.array(tensor) for key, tensor in archive.value.items()}


def refused(content: bytes, message: str) -> None:
    with pytest.raises(ConceptUnreadable, match=message):
        read(content)


@both_containers
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    + [torch.int16, torch.int8, torch.uint8, torch.bool],
    ids=str,
)
def test_values_are_those_that_were_saved(dtype: torch.dtype, zipped: bool) -> None:
    tensor = (VALUES * 100).to(dtype)
    found = arrays(saved({"x": tensor}, zipped))["x"]
    # Every bfloat16 is a float32, and NumPy has no narrower one.
    expected = (tensor.float() if dtype == torch.bfloat16 else tensor).numpy()
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


@both_containers
def test_views_of_one_storage_are_read(zipped: bool) -> None:
    views = {
        "rest": VALUES[1:],
        "turned": VALUES.T,
        "every other": VALUES[:, ::2],
        "row": VALUES[0],
        "one": VALUES[1, 2],
        "none": VALUES[:0],
        "thin": VALUES[:, 3:4],
    }
    found = arrays(saved(views, zipped))
    for name, view in views.items():
        np.testing.assert_array_equal(found[name], view.numpy(), strict=True)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@both_containers
def test_every_protocol_of_pickle_is_read(protocol: int, zipped: bool) -> None:
    content = saved({"x": VALUES, "n": 2**40, "s": "\u732b", "f": 0.5}, zipped, protocol)
    archive = read(content)
    value: Any = archive.value
    assert (value["n"], value["s"], value["f"]) == (2**40, "\u732b", 0.5)
    np.testing.assert_array_equal(archive.array(value["x"]), VALUES.numpy())


@both_containers
def test_parameters_and_their_dictionaries_are_inert(zipped: bool) -> None:
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(VALUES)})
    archive = read(saved({"p": parameters}, zipped))
    value: Any = archive.value
    assert type(value["p"]) is Record
    tensor = value["p"].state["_parameters"]["*"]
    assert type(tensor) is TorchTensor
    np.testing.assert_array_equal(archive.array(tensor), VALUES.numpy())


def test_the_byte_order_of_the_file_counts() -> None:
    def swapped(name: str, content: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return b"big"
        return (
            np.frombuffer(content, "<f4").astype(">f4").tobytes() if "/data/" in name else content
        )

    content = changed(saved({"x": VALUES}), swapped)
    np.testing.assert_array_equal(arrays(content)["x"], VALUES.numpy(), strict=True)


def changed(archive: bytes, change: Callable[[str, bytes], bytes | None]) -> bytes:
    """An archive with other content in its files; None leaves one out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return buffer.getvalue()


def with_pickle(content: bytes) -> bytes:
    """A file of torch.save with this for its pickle."""
    return changed(
        saved({"x": VALUES}), lambda name, old: content if name.endswith("data.pkl") else old
    )


# Hostile pickles. None may do anything: most would leave a file behind.


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def hostile(marker: Path) -> dict[str, Call]:
    command = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Call(os.system, f"touch {marker}"),  # pyright: ignore[reportDeprecated]
        "builtins.eval": Call(eval, command),
        "builtins.exec": Call(exec, command),
        "builtins.getattr": Call(getattr, os, "system"),
        "torch.serialization.load": Call(torch.load, str(marker)),
    }


HOSTILE = [*hostile(Path("/never"))]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
@both_containers
def test_a_hostile_global_is_named_and_not_touched(
    name: str, protocol: int, zipped: bool, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    call = hostile(marker)[name]
    nested = Call(collections.OrderedDict, [("x", call)])
    if name == "builtins.getattr":
        call = nested = Call(getattr, "text", "upper")  # a module cannot be pickled
    # Protocol 2 writes Python 2's name of the module.
    message = "asks for '(__builtin__|builtins)." if "builtins" in name else f"asks for '{name}'"
    for value in ({"<x>": VALUES, "y": call}, call, [[[nested]]]):
        refused(saved(value, zipped, protocol), message)
    assert not marker.exists()


def test_a_bare_pickle_is_refused_unread(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for protocol in range(2, 6):
        content = pickle.dumps(Call(os.system, f"touch {marker}"), protocol)  # pyright: ignore[reportDeprecated]
        assert is_torch_archive(content)
        refused(content, "asks for 'posix.system'")
    assert not marker.exists()


GLOBALS = {
    "REDUCE of a class of storages": b"ctorch\nFloatStorage\n)R.",
    "REDUCE of text": b"X\x01\x00\x00\x00x)R.",
    "REDUCE of a tensor's builder without arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "REDUCE with a list": b"ccollections\nOrderedDict\n]R.",
    "NEWOBJ of a class of storages": b"ctorch\nFloatStorage\n)\x81.",
    "BUILD on a dictionary": b"}}b.",
    "BUILD with text": b"ctorch.nn.modules.container\nParameterDict\n)\x81Nb.",
    "name of a name": b"\x8c\x02os\x8c\x06system\x93.",
    "name that is a list": b"]]\x93.",
    "submodule": b"ctorch\n_utils._rebuild_tensor_v2.__globals__\n.",
    "INST": b"(ios\nsystem\n.",
    "OBJ": b"(ctorch\nFloatStorage\no.",
    "NEWOBJ_EX": b"ctorch\nFloatStorage\n)}\x92.",
    "EXT1": b"\x82\x01.",
    "PERSID": b"P1\n.",
    "persistent id that is text": b"X\x01\x00\x00\x00xQ.",
    "BINBYTES": b"B\x01\x00\x00\x00x.",
    "protocol 0 text": b"S'x'\n.",
    "NEXT_BUFFER": b"\x97.",
    "memo that is not there": b"h\x05.",
    "too little": b"\x85.",
    "nothing": b".",
    "two values": b"NN.",
    "open mark": b"(N.",
    "no STOP": b"N",
    "unknown opcode": b"\xff.",
    "odd items": b"}(Nu.",
    "items of nothing": b"NNNs.",
    "append to a dictionary": b"}Na.",
    "tuple as a key": b"})Ns.",
    "list as a key": b"}]Ns.",
    "key twice": b"}(K\x01NK\x01Nu.",
    "long integer": b"\x8b\x20\x00\x00\x00" + b"\x01" * 32 + b".",
    "broken text": b"X\x01\x00\x00\x00\xff.",
    "text beyond the end": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.",
    "bytes after the end": b"N.N",
}


@pytest.mark.parametrize("name", GLOBALS)
def test_what_no_tensor_needs_is_refused(name: str) -> None:
    refused(with_pickle(b"\x80\x02" + GLOBALS[name]), "test cannot be read as a PyTorch file")


def test_deep_and_long_pickles_end_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = b"\x80\x02N" + b"\x85" * 30_000 + b"."
    assert type(read(with_pickle(deep)).value) is tuple  # not hashed, not printed, not walked
    lists = b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b"."
    assert type(read(with_pickle(lists)).value) is list
    own = b"\x80\x02]q\x00h\x00a."  # a list within itself
    assert type(read(with_pickle(own)).value) is list
    monkeypatch.setattr("engine.dialects.inert_pickles.MAX_OPCODES", 100)
    read(with_pickle(b"\x80\x02]" + b"Na" * 48 + b"."))
    refused(with_pickle(b"\x80\x02]" + b"Na" * 49 + b"."), "more than 100 pickle opcodes")


class FakeStorage:
    def __init__(self, *identity: object) -> None:
        self.identity = identity


class FakePickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.identity if isinstance(obj, FakeStorage) else None


def tensor_file(
    offset: object, shape: object, strides: object, count: object = 12, key: object = "0"
) -> bytes:
    """A file whose tensor is described so; its storage has 12 values."""
    storage = FakeStorage("storage", torch.FloatStorage, key, "cpu", count)
    hooks: collections.OrderedDict[object, object] = collections.OrderedDict()
    rebuild = torch._utils._rebuild_tensor_v2  # pyright: ignore[reportAttributeAccessIssue]
    call = Call(
        rebuild, storage, offset, shape, strides, False, hooks
    )  # fmt: skip
    buffer = io.BytesIO()
    FakePickler(buffer, 2).dump({"x": call})
    return with_pickle(buffer.getvalue())


def test_the_fake_is_like_the_real_one() -> None:
    np.testing.assert_array_equal(arrays(tensor_file(0, (2, 6), (6, 1)))["x"], VALUES.numpy())


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ((0, (2, 6), (-6, 1)), "below 0"),
        ((-1, (2, 5), (5, 1)), "below 0"),
        ((0, (-2, -6), (6, 1)), "below 0"),
        ((0, (2, 6.0), (6, 1)), "not whole"),
        ((0, (2, True), (6, 1)), "not whole"),
        ((0, [2, 6], (6, 1)), "not whole"),
        ((0, (2, 6), (0, 1)), "overlap"),
        ((0, (2, 6), (1, 1)), "overlap"),
        ((0, (2, 6), (5, 1)), "overlap"),
        ((1, (2, 6), (6, 1)), "needs 13 values, its storage has 12"),
        ((13, (0, 6), (6, 1)), "needs 13 values"),
        ((0, (2, 6), (7, 1)), "needs 13 values"),
        ((2**100, (2, 6), (6, 1)), "its storage has 12"),
        ((0, (2**40, 2**40), (2**40, 1)), "at most 75 x 8192"),
        ((0, (0, 2**62), (1, 1)), "at most 75 x 8192"),
        ((0, (2, 6), (1,)), "1 strides"),
        ((0, (1,) * 20, (1,) * 20), "20 strides"),
        ((0, (2, 6), (6, 1), 13), "48 bytes, its pickle says 52"),
        ((0, (2, 6), (6, 1), 2**60), "does not fit the file"),
        ((0, (2, 6), (6, 1), -1), "does not fit the file"),
        ((0, (2, 6), (6, 1), [[12]]), "does not fit the file"),
        ((0, (2, 6), (6, 1), 12, "1"), "lacks 'archive/data/1'"),
        ((0, (2, 6), (6, 1), 12, "../data/0"), "not its class and number"),
        ((0, (2, 6), (6, 1), 12, "/etc/passwd"), "not its class and number"),
        ((0, (2, 6), (6, 1), 12, 0), "not its class and number"),
    ],
)
def test_tensors_that_cannot_be_are_refused(description: tuple[Any, ...], message: str) -> None:
    refused(tensor_file(*description), message)


def test_strides_of_an_axis_of_one_do_not_matter() -> None:
    found = arrays(tensor_file(0, (1, 6), (2**100, 1)))["x"]
    np.testing.assert_array_equal(found, VALUES.numpy()[:1])


def rezipped(*files: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


NONE = b"\x80\x02N."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rezipped(), "cannot be read"),
        (rezipped(("a/b", b"")), "0 files data.pkl"),
        (rezipped(("a/data.pkl", NONE), ("b/data.pkl", NONE)), "2 files data.pkl"),
        (rezipped(("a/data.pkl", NONE), ("a/constants.pkl", NONE)), "TorchScript"),
        (rezipped(("a/data.pkl", NONE), ("a/byteorder", b"middle")), "byte order is 'middle'"),
        (rezipped(*((f"{i}/data.pkl", NONE) for i in range(2001))), "2001 files"),
        (
            rezipped(("a/data.pkl", bytes(3 << 20)), compression=zipfile.ZIP_DEFLATED),
            "overlap|compressed",
        ),
        (rezipped(("a/data.pkl", NONE * 9), compression=zipfile.ZIP_BZIP2), "overlap|compressed"),
    ],
    ids=["empty", "no pickle", "two pickles", "script", "byte order", "many", "bomb", "bzip2"],
)
def test_archives_that_are_not_pytorchs_are_refused(content: bytes, message: str) -> None:
    refused(content, message)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_name_twice_in_an_archive_is_refused() -> None:
    refused(rezipped(("a/data.pkl", NONE), ("a/data.pkl", NONE)), "all different")


def test_files_of_an_archive_that_overlap_are_refused() -> None:
    """A directory whose sizes add up to more than the file, as in bombs without compression."""
    content = bytearray(rezipped(("a/data.pkl", NONE), ("a/b", bytes(100))))
    directory = content.index(b"PK\x01\x02")
    for place in (directory + 20, directory + 24):  # compressed and plain size of the first
        content[place : place + 4] = struct.pack("<I", 10_000)
    refused(bytes(content), "overlap")


@both_containers
def test_a_file_cut_anywhere_is_refused(zipped: bool) -> None:
    whole = saved({"<x>": VALUES}, zipped)
    for length in (*range(0, len(whole), 5), len(whole) - 1):
        refused(whole[:length], "cannot be read as a PyTorch file")


def test_bytes_behind_the_storages_are_refused() -> None:
    refused(saved({"<x>": VALUES}, zipped=False) + b"\0", "1 bytes follow its end")


def test_a_damaged_value_in_an_archive_is_found() -> None:
    content = saved({"<x>": VALUES})
    place = content.index(VALUES.numpy().tobytes()) + 5
    refused(content[:place] + b"\x7f" + content[place + 1 :], "CRC")


@both_containers
def test_whatever_the_bytes_the_answer_is_a_value_or_words(zipped: bool) -> None:
    """300 files with some bytes changed; the seed makes them the same ones each time."""
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(VALUES)})
    whole = saved({"string_to_param": parameters, "name": "x"}, zipped, 2)
    generator = random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 2, 8])):
            content[generator.randrange(min(len(content), 2500))] = generator.randrange(256)
        try:
            archive = read(bytes(content))
        except ConceptUnreadable:
            continue
        tensors: list[object] = (
            list(archive.value.values()) if isinstance(archive.value, dict) else []
        )
        for tensor in tensors:
            if isinstance(tensor, TorchTensor):
                archive.array(tensor)


def test_a_whole_model_is_refused_by_its_size() -> None:
    refused(bytes(5 << 20), "has 5242880 bytes, a concept file has at most 4194304")


@both_containers
def test_a_server_reads_no_pytorch_files(zipped: bool) -> None:
    """What an import over the network goes through stays at safetensors."""
    with pytest.raises(ConceptUnreadable, match="is a pickle"):
        concept_from_bytes(saved({"<x>": VALUES}, zipped), source="test")


def test_what_we_write_pytorch_reads_without_trust(tmp_path: Path) -> None:
    value = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": VALUES.numpy(), "row": VALUES[0].numpy()},
        "name": "<\u732b>",
        "numbers": {str(n): n for n in (0, 1, -1, 127, 128, -128, -129, 2**40, -(2**70))},
        "nothing": None,
    }
    path = tmp_path / "x.pt"
    path.write_bytes(torch_archive(value))
    loaded = torch.load(path, weights_only=True)
    assert loaded["string_to_token"] == {"*": 265}
    assert (loaded["name"], loaded["nothing"]) == ("<\u732b>", None)
    assert loaded["numbers"] == value["numbers"]
    for name, tensor in loaded["string_to_param"].items():
        expected = value["string_to_param"][name]  # type: ignore[index]
        np.testing.assert_array_equal(tensor.numpy(), expected, strict=True)
    assert torch_archive(value) == path.read_bytes()


def test_what_we_write_we_read() -> None:
    content = torch_archive({"x": VALUES.numpy()})
    np.testing.assert_array_equal(arrays(content)["x"], VALUES.numpy(), strict=True)
