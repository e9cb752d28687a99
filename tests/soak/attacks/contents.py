"""Files that lie: concepts, vectors and pictures."""

import io
import json
import pickle
import random
import struct
import zipfile
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from engine.concepts import concept_to_bytes
from protos.oneword.v1 import concepts_pb2
from protos.oneword.v1 import generation_pb2 as pb
from tests.soak.attacks.registry import attack
from tests.soak.field import CONCEPTS, DIM, GENERATE, INTRUDER, Field, make_concept

WHO = INTRUDER
SOUND = concept_to_bytes(make_concept("<sound>", 1.0))
NAMES = [
    "../../etc/passwd", "..\\..\\x", "/etc/passwd", "<a\0b>", "%2e%2e", "<" + "a" * 65_536 + ">",
    "<\u202ecat>", "<c\u0430t>", "<ca\u200dt>", "<CAT>", "con", "aux", "<\U0001f600>", "the",
    "<cat>2", "<cat", "cat>", "<>", "", " ", "<a b>", "<a@latest>", "@latest", "<cat>@1", "e\u0301",
    "-rf", "'; DROP TABLE concepts; --", "\n", "\x1b[2J", "__metadata__", "*", "<a>\u2028",
]  # fmt: skip

REFERENCES = ("@1", "@latest", "@0", "@-1", "@99999999999999999999", "@", "@sha256:",
              "@sha256:" + "f" * 64, "@stable", "@@1")  # fmt: skip


class _Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("__import__('os')._exit(9)",)


def with_header(header: object, data: bytes = b"") -> bytes:
    """A safetensors file whose header says anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lying_files(chance: random.Random) -> list[bytes]:
    """What calls itself a concept and is none."""
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Harmful()))
    tensor = {"dtype": "F32", "shape": [1, DIM], "data_offsets": [0, 4 * DIM]}
    data = bytes(4 * DIM)
    two = {"a": tensor, "b": {**tensor, "data_offsets": [4, 4 * DIM + 4]}}
    noise = bytearray(SOUND)
    for _ in range(chance.randrange(1, 8)):
        noise[chance.randrange(len(noise))] = chance.randrange(256)
    doubled = b'{"a":' + json.dumps(tensor).encode() + b',"a":' + json.dumps(tensor).encode() + b"}"
    return [
        b"", b"x", SOUND[: chance.randrange(len(SOUND))], SOUND + b"\0", bytes(noise),
        struct.pack("<Q", 2**63) + SOUND[8:], struct.pack("<Q", 2**64 - 1), zipped.getvalue(),
        *(pickle.dumps(_Harmful(), protocol) for protocol in range(6)),
        with_header({f"t{i}": {**tensor, "data_offsets": [0, 0]} for i in range(20_000)}),
        with_header(doubled, data), with_header(two, data + b"1234"),
        with_header({"a": {**tensor, "data_offsets": [8, 4 * DIM + 8]}}, data + b"12345678"),
        with_header({"a": {**tensor, "shape": [-1, DIM]}}, data),
        with_header({"a": {**tensor, "shape": [2**40, 2**40]}}, data),
        with_header({"a": {**tensor, "dtype": "I8"}}, data),
        with_header({"__metadata__": {"k": "v" * (3 << 20)}, "<a>": tensor}, data),
        with_header({"__metadata__": {f"k{i}": "" for i in range(50_000)}, "<a>": tensor}, data),
        with_header(b"[" * 100_000), with_header(b'{"a":' * 50_000), with_header(b"\xff\xfe"),
        save({"<a>": np.full((1, DIM), np.nan, np.float32)}),
        save({"<a>": np.full((1, DIM), np.inf, np.float32)}),
        save({"<a>": np.full((1, DIM), 1e38, np.float32)}),
        save({"<a>": np.zeros((5000, DIM), np.float32)}),
        save({"<a>": np.zeros((2, 2 * DIM), np.float32)}), bytes(5 << 20),
    ]  # fmt: skip


@attack(1, 2)
async def concept_files_that_lie(field: Field, chance: random.Random) -> None:
    """Imported and sent along."""
    async with field.caller(WHO) as caller:
        for content in chance.sample(lying_files(chance), 12):
            name = chance.choice(["", "<lie>"])
            await field.attempt(
                caller,
                WHO,
                f"{CONCEPTS}ImportConcept",
                concepts_pb2.ImportConceptRequest(
                    content=content, placeholder_token=name, overwrite=True
                ),
            )
            inline = pb.InlineConcept(safetensors=content[: 1 << 20], placeholder_token="<a>")
            reference = pb.ConceptReference(inline=inline)
            await field.attempt(
                caller, WHO, GENERATE, field.draw(prompt="a <a>", concepts=[reference])
            )


@attack(3)
async def hostile_names(field: Field, chance: random.Random) -> None:
    """Names that are paths, code, other names' doubles, or nothing to be seen."""
    async with field.caller(WHO) as caller:
        for name in chance.sample(NAMES, 12):
            await field.attempt(
                caller,
                WHO,
                f"{CONCEPTS}ImportConcept",
                concepts_pb2.ImportConceptRequest(content=SOUND, placeholder_token=name),
            )
            key: dict[str, Any] = {"placeholder_token": name}
            for method, kind in (
                ("GetConcept", concepts_pb2.GetConceptRequest),
                ("ExportConcept", concepts_pb2.ExportConceptRequest),
                ("DeleteConcept", concepts_pb2.DeleteConceptRequest),
            ):
                await field.attempt(caller, WHO, CONCEPTS + method, kind(**key))
            reference = pb.ConceptReference(placeholder_token=name)
            await field.attempt(caller, WHO, GENERATE, field.draw(concepts=[reference]))


@attack(2, 16)
async def vectors_that_are_no_numbers(field: Field, chance: random.Random) -> None:
    """NaN, infinities, and numbers that become them within the model."""
    values = [float("nan"), float("inf"), 1e38, -3e38, 1e-45, 1e19, 6e4]
    async with field.caller(WHO) as caller:
        for value in values:
            vectors = pb.LearnedEmbeddings(
                values=[value] * DIM * chance.choice([1, 2]), num_vectors=chance.choice([0, 1, 75])
            )
            if chance.random() < 0.7:
                vectors = pb.LearnedEmbeddings(values=[value] * DIM)
            inline = pb.InlineConcept(placeholder_token="<nan>", learned_embeddings=vectors)
            reference = pb.ConceptReference(inline=inline)
            request = field.draw(prompt="a <nan>", concepts=[reference])
            await field.attempt(caller, WHO, GENERATE, request)


@attack(3, 14)
async def reference_games(field: Field, chance: random.Random) -> None:
    """Versions, aliases and digests that are not, or not any more; deleted and replaced in use."""
    get = concepts_pb2.GetConceptRequest
    async with field.caller(WHO) as caller:
        for turn in range(12):
            name = f"<game-{chance.randrange(3)}>"
            content = concept_to_bytes(make_concept(name, turn + chance.random()))
            await field.attempt(
                caller,
                WHO,
                f"{CONCEPTS}ImportConcept",
                concepts_pb2.ImportConceptRequest(content=content, overwrite=chance.random() < 0.8),
            )
            reference = chance.choice(REFERENCES)
            await field.attempt(
                caller, WHO, f"{CONCEPTS}GetConcept", get(placeholder_token=name + reference)
            )
            call = caller.start(
                GENERATE, field.draw(prompt=f"a {name}", num_inference_steps=10), timeout=10.0
            )
            delete = concepts_pb2.DeleteConceptRequest(placeholder_token=name)
            await field.attempt(caller, WHO, f"{CONCEPTS}DeleteConcept", delete)
            call.cancel()


def _png(width: int, height: int) -> bytes:
    """The beginning of a picture that claims a size."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    return bytes(content)


def lying_pictures(chance: random.Random) -> list[bytes]:
    buffer, animated, large = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("CMYK", (64, 64)).save(buffer, "JPEG")
    frames = [Image.new("L", (8, 8), number % 256) for number in range(200)]
    frames[0].save(animated, "PNG", save_all=True, append_images=frames[1:])
    Image.new("1", (6000, 6000)).save(large, "PNG")
    jpeg = buffer.getvalue()
    noise = bytearray(jpeg)
    for _ in range(10):
        noise[chance.randrange(2, len(noise))] = chance.randrange(256)
    return [
        b"x", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", b"<svg/>", b"GIF89a",
        b"icns\0\0\0\x10", b"RIFF\xff\xff\xff\xffWEBPVP8X", jpeg, jpeg[:-200], bytes(noise),
        animated.getvalue(), large.getvalue(), _png(65_535, 65_535), _png(2**31 - 1, 1), _png(0, 0),
        jpeg + zipfile_of(b"x"),
    ]  # fmt: skip


def zipfile_of(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", content)
    return buffer.getvalue()


@attack(5)
async def pictures_that_lie(field: Field, chance: random.Random) -> None:
    """Initial images that are bombs, scripts, cut, or something else."""
    async with field.caller(WHO) as caller:
        for content in chance.sample(lying_pictures(chance), 8):
            request = field.draw(init_image=content, strength=0.5)
            await field.attempt(caller, WHO, GENERATE, request)
