"""Concept files: what is read, what is written, and what is refused."""

import hashlib
import io
import json
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from engine.bundle import TextSpec
from engine.concepts import (
    Concept,
    check_fits,
    concept_from_bytes,
    concept_to_bytes,
    read_concept,
    write_concept,
)
from engine.errors import ConceptMismatch, ConceptUnreadable, InvalidRequest

VECTORS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)
VECTORS_2 = np.linspace(2, 3, 20, dtype=np.float32).reshape(2, 10)
TEXT = TextSpec(
    max_tokens=8,
    dim=6,
    output_dim=6,
    vocab_size=10,
    bos_token_id=8,
    eos_token_id=9,
    pad_token_id=9,
    embedding_fingerprint="a" * 64,
)


def concept(**changes: object) -> Concept:
    fields = {"placeholder_token": "<x>", "learned_embeddings": VECTORS} | changes
    return Concept(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("file_format", ["oneword", "diffusers"])
def test_a_concept_survives_its_file(tmp_path: Path, file_format: str) -> None:
    path = tmp_path / "x.safetensors"
    write_concept(concept(), path, file_format)  # type: ignore[arg-type]
    read = read_concept(path)
    assert read.placeholder_token == "<x>"
    assert read.concept_id == concept().concept_id
    np.testing.assert_array_equal(read.learned_embeddings, VECTORS)


def test_own_format_keeps_fingerprint_and_metadata() -> None:
    original = concept(embedding_fingerprint="f" * 64, metadata={"steps": "250"})
    read = concept_from_bytes(concept_to_bytes(original), source="test")
    assert read.embedding_fingerprint == "f" * 64
    assert read.metadata == {"steps": "250"}


def test_diffusers_format_is_what_its_trainer_writes() -> None:
    header = concept_to_bytes(concept(), "diffusers")
    (length,) = struct.unpack("<Q", header[:8])
    assert json.loads(header[8 : 8 + length]).keys() == {"<x>"}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_vector_without_an_axis_is_read(dtype: type) -> None:
    read = concept_from_bytes(save({"<y>": VECTORS[0].astype(dtype)}), source="test")
    assert read.learned_embeddings.shape == (1, 6)
    assert read.learned_embeddings.dtype == np.float32


def bfloat16(values: np.ndarray) -> bytes:
    """A file of one concept whose tensor holds the upper halves of float32 numbers."""
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return safetensors_of("BF16", values.shape, data)


def safetensors_of(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"<x>": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_bfloat16_is_read() -> None:
    exact = np.array([[1.0, -2.5, 0.0, 3.0e38], [2.0**-120, 1e-40, -0.0, 0.15625]], np.float32)
    exact = (exact.view(np.uint32) & 0xFFFF0000).view(np.float32)  # what bfloat16 can hold
    read = concept_from_bytes(bfloat16(exact), source="test").learned_embeddings
    np.testing.assert_array_equal(read.view(np.uint32), exact.view(np.uint32))


def test_a_bfloat16_infinity_is_refused() -> None:
    with pytest.raises(ConceptUnreadable, match="infinite"):
        concept_from_bytes(bfloat16(np.full((1, 6), np.inf, np.float32)), source="test")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U8", "BOOL"])
def test_other_numbers_are_refused_by_their_name(dtype: str) -> None:
    with pytest.raises(ConceptUnreadable, match=f"holds {dtype} values.*convert it to float32"):
        concept_from_bytes(safetensors_of(dtype, (1, 6), bytes(6)), source="test")


@pytest.mark.parametrize(
    "version", ["oneword-concept/2", "oneword-concept/", "oneword-concept/1.1"]
)
def test_a_file_of_another_version_is_refused(version: str) -> None:
    content = save({"text_encoder": VECTORS}, metadata={"format": version})
    for rename in (None, "<x>"):
        with pytest.raises(ConceptUnreadable, match=f"'{version}'.*reads 'oneword-concept/1'"):
            concept_from_bytes(content, source="test", placeholder_token=rename)


def test_the_id_is_the_digest_that_the_documentation_says() -> None:
    """In other words than the code: shape as two int64, then the values, all little-endian."""
    content = b"".join(number.to_bytes(8, "little") for number in (2, 6))
    content += b"".join(struct.pack("<f", value) for row in VECTORS for value in row)
    assert concept().concept_id == hashlib.sha256(content).hexdigest()


def header_of(content: bytes) -> tuple[dict[str, str], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"], content[8 + length :]


def test_the_model_spec_hash_is_that_of_the_tensor_bytes() -> None:
    metadata, tensors = header_of(concept_to_bytes(concept()))
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"


def test_an_architecture_is_told_where_it_is_known_and_kept() -> None:
    assert "modelspec.architecture" not in header_of(concept_to_bytes(concept()))[0]
    told = {"modelspec.architecture": "stable-diffusion-v2-512/textual-inversion"}
    content = concept_to_bytes(concept(metadata=told))
    assert header_of(content)[0]["modelspec.architecture"] == told["modelspec.architecture"]
    assert concept_from_bytes(content, source="test").metadata == told


def test_what_is_derived_cannot_be_said_otherwise() -> None:
    false = {"modelspec.title": "other", "placeholder_token": "<other>", "format": "other"}
    read = concept_from_bytes(concept_to_bytes(concept(metadata=false)), source="test")
    assert (read.placeholder_token, read.metadata) == ("<x>", {})


def test_the_id_is_of_the_vectors_not_of_the_name() -> None:
    assert concept().concept_id == concept(placeholder_token="<other>").concept_id
    assert concept().concept_id != concept(learned_embeddings=VECTORS.reshape(3, 4)).concept_id


def test_both_text_encoders_survive_the_file() -> None:
    original = concept(learned_embeddings_2=VECTORS_2, metadata={"steps": "250"})
    content = concept_to_bytes(original)
    read = concept_from_bytes(content, source="test")
    np.testing.assert_array_equal(read.learned_embeddings, VECTORS, strict=True)
    np.testing.assert_array_equal(read.learned_embeddings_2, VECTORS_2, strict=True)
    assert (read.dims, read.metadata, read.concept_id) == (
        (6, 10),
        {"steps": "250"},
        original.concept_id,
    )
    metadata, tensors = header_of(content)
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert tensors == VECTORS.tobytes() + VECTORS_2.tobytes()


def test_the_id_is_of_both_text_encoders() -> None:
    """The digest of a concept for one, then shape and values for the second."""
    content = struct.pack("<qq", 2, 6) + VECTORS.tobytes()
    assert concept().concept_id == hashlib.sha256(content).hexdigest()
    content += struct.pack("<qq", 2, 10) + VECTORS_2.tobytes()
    both = concept(learned_embeddings_2=VECTORS_2)
    assert both.concept_id == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (VECTORS_2[:1], "2 vectors for the first text encoder and 1 for the second"),
        (VECTORS_2 * np.float32(np.nan), "NaN"),
        (np.zeros((2, 9000), np.float32), "2 vectors of width 9000"),
    ],
)
def test_a_second_text_encoder_is_checked_like_the_first(second: np.ndarray, message: str) -> None:
    content = save(
        {"text_encoder": VECTORS, "text_encoder_2": second},
        metadata={"format": "oneword-concept/1", "placeholder_token": "<x>"},
    )
    with pytest.raises(ConceptUnreadable, match=message):
        concept_from_bytes(content, source="test")


@pytest.mark.parametrize("names", [("text_encoder_2",), ("text_encoder", "text_encoder_3")])
def test_other_tensors_in_a_file_of_ours_are_refused(names: tuple[str, ...]) -> None:
    content = save(dict.fromkeys(names, VECTORS), metadata={"format": "oneword-concept/1"})
    with pytest.raises(ConceptUnreadable, match="'text_encoder_2' for a second text encoder"):
        concept_from_bytes(content, source="test")


def test_no_text_encoder_is_dropped_for_diffusers() -> None:
    with pytest.raises(InvalidRequest, match="for two text encoders, diffusers keeps one"):
        concept_to_bytes(concept(learned_embeddings_2=VECTORS_2), "diffusers")


def test_a_concept_for_two_text_encoders_does_not_fit_a_model_with_one() -> None:
    both = concept(learned_embeddings_2=VECTORS_2)
    with pytest.raises(ConceptMismatch, match=r"width 6 \+ 10, model 'm' wants 6;"):
        check_fits(both, TEXT, model_name="m")
    check_fits(both, TEXT, text_2=replace(TEXT, dim=10), model_name="m")
    with pytest.raises(ConceptMismatch, match=r"width 6, model 'm' wants 6 \+ 10;"):
        check_fits(concept(), TEXT, text_2=replace(TEXT, dim=10), model_name="m")


def test_renaming_on_reading() -> None:
    content = concept_to_bytes(concept())
    assert (
        concept_from_bytes(content, source="t", placeholder_token="<z>").placeholder_token == "<z>"
    )


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


def _zip_of_a_pickle() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Harmful()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [pickle.dumps(_Harmful(), p) for p in (2, 3, 4, 5)] + [_zip_of_a_pickle()]
)
def test_a_pickle_is_refused_whatever_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConceptUnreadable, match="is a pickle"):
        read_concept(path)


WHOLE = save({"<x>": VECTORS})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        WHOLE[:4],
        WHOLE[:40],
        WHOLE[:-1],
        WHOLE + b"\0",
        struct.pack("<Q", 2**63) + WHOLE[8:],
        struct.pack("<Q", 8) + b"[1, 2]  ",
        b"<!DOCTYPE html>",
    ],
    ids=["empty", "no header", "half a header", "cut", "too long", "huge header", "list", "html"],
)
def test_a_broken_file_is_refused(content: bytes) -> None:
    with pytest.raises(ConceptUnreadable):
        concept_from_bytes(content, source="broken")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"<x>": np.full((1, 6), np.nan, np.float32)}, "NaN"),
        ({"<x>": np.full((1, 6), 1e300, np.float64)}, "infinite"),
        ({"<x>": np.zeros((0, 6), np.float32)}, "0 vectors"),
        ({"<x>": np.zeros((200, 6), np.float32)}, "200 vectors"),
        ({"<x>": np.zeros((1, 2, 3), np.float32)}, r"shape \[1, 2, 3\]"),
        ({"<x>": np.zeros((1, 6), np.int8)}, "holds I8 values"),
        ({"clip_l": VECTORS, "clip_g": VECTORS}, "2 tensors"),
        ({"emb_params": VECTORS}, "does not say its placeholder"),
        ({"text_encoder": VECTORS}, "does not say its placeholder"),
        ({"clip_l": VECTORS}, "does not say its placeholder"),
        ({"clip_g": VECTORS}, "does not say its placeholder"),
        ({"../../etc/passwd ": VECTORS}, "not allowed"),
        ({"a" * 65: VECTORS}, "1 to 64 characters, got 65"),
    ],
)
def test_contents_that_are_no_concept_are_refused(
    tensors: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ConceptUnreadable, match=message):
        concept_from_bytes(save(tensors), source="test")


@pytest.mark.parametrize(
    "token",
    ["", "a b", "a\nb", "(x)", "x:1", "a\u202eb", "x\0y", "\\x"]
    + ["<a<b>", "<c>>", "my<cat>toy", "cat>toy", "<<a>", "a<"]
    + [f"<{blank}>" for blank in "\u3164\u115f\u1160\uffa0\u2800\u034f\ufe00\ufe0f\u17b4"]
    + [f"<a{blank}>" for blank in "\U000e0100\U000e01ef\u180b\u180f\u2028\u2029\u3000\xa0\x85"]
    + ["<\ue000>", "<\u0378>", "<\ud800>", "<\u200d>"],
    ids=ascii,
)
def test_names_that_could_be_mistaken_are_refused(token: str) -> None:
    with pytest.raises(ConceptUnreadable, match="placeholder token"):
        concept(placeholder_token=token)


@pytest.mark.parametrize(
    "token", ["<x>", "cat", "<\u732b>", "<\u00e9>", "<\U0001f600>", "<a", "b>", "a/b"]
)
def test_names_that_look_like_what_they_are_can_be_used(token: str) -> None:
    assert concept(placeholder_token=token).placeholder_token == token


def test_a_name_that_another_spelling_looks_like_is_refused() -> None:
    with pytest.raises(ConceptUnreadable, match="NFC"):
        concept(placeholder_token="<e\u0301>")


def test_a_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(ConceptUnreadable, match="at most 4194304"):
        read_concept(path)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConceptUnreadable, match="No such file"):
        read_concept(tmp_path / "none.safetensors")


def test_a_concept_of_another_width_does_not_fit() -> None:
    other = concept(learned_embeddings=VECTORS.reshape(3, 4))
    with pytest.raises(ConceptMismatch, match="width 4, model 'm' wants 6"):
        check_fits(other, TEXT, model_name="m")


def test_a_concept_of_another_vocabulary_does_not_fit() -> None:
    with pytest.raises(ConceptMismatch, match=r"bbbbbbbbbbbb\.\.\., model 'm' has aaaaaaaaaaaa"):
        check_fits(concept(embedding_fingerprint="b" * 64), TEXT, model_name="m")


def test_a_concept_longer_than_a_chunk_does_not_fit() -> None:
    with pytest.raises(ConceptMismatch, match="7 vectors.* room for 6"):
        check_fits(concept(learned_embeddings=np.ones((7, 6), np.float32)), TEXT, model_name="m")


def test_a_concept_without_fingerprint_fits_by_width() -> None:
    check_fits(concept(), TEXT, model_name="m")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_concept(concept(), path)
    before = path.read_bytes()

    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_concept(concept(learned_embeddings=VECTORS * 2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
