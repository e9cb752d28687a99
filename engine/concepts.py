"""Concepts: learned pseudo-words as files and as checked values.

Own format: one safetensors file with the tensor `text_encoder` [num_vectors, dim], for a model with
two text encoders also `text_encoder_2` [num_vectors, dim_2], and as metadata the placeholder token,
the embedding fingerprint of the model it was learned on, and how it was learned. Keys of ModelSpec
1.0.1 (github.com/Stability-AI/ModelSpec) are written beside ours for other tools to read; its
`hash_sha256` is of the tensors' bytes alone, unlike `concept_id`.

Also read and written: diffusers' `learned_embeds.safetensors` (one tensor whose key is the token).
What other tools write is in `engine.dialects`, which a server does not use. Nothing is unpickled.
"""

import hashlib
import json
import re
import struct
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as save_safetensors

from engine.bundle import TextSpec
from engine.errors import ConceptMismatch, ConceptUnreadable, InvalidRequest, quoted
from engine.files import write_atomically

_FORMAT_FAMILY = "oneword-concept/"
FORMAT = f"{_FORMAT_FAMILY}1"
TENSOR_NAME = "text_encoder"
TENSOR_NAME_2 = "text_encoder_2"
MAX_FILE_BYTES = 4 << 20
MAX_NUM_VECTORS = 75
MAX_DIM = 8192
MAX_PLACEHOLDER_LENGTH = 64
_PICKLE_BEGINNINGS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# What we, kohya, OneTrainer, A1111, pivotal tuning and SDXL's tools call the tensors of a file: the
# names of text encoders or of nothing, which would do nothing as a token.
KEYS_WITHOUT_A_NAME = (TENSOR_NAME, "emb_params", "emp_params", "clip_l", "clip_g",
                       "text_encoders_0", "text_encoders_1", "string_to_param")  # fmt: skip
KEYS_OF_T5 = ("t5", "t5xxl")
_OUTPUT = "_out"
_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
FileFormat = Literal["oneword", "diffusers"]

# Nothing that prompts give a meaning; `<` and `>` at the ends only, where prompts look for them.
_TOKEN = re.compile(r"<?[^\\()\[\]:,<>]*>?")
# Letters, marks and symbols that show as nothing: Unicode's Default_Ignorable_Code_Point outside
# category C, and the blank Braille pattern. A token must look like what it is, and no other.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
_RESERVED_TOKENS = ("__metadata__",)  # no tensor of a safetensors file can be called so


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """A learned pseudo-word: what the trainer writes and the engine serves."""

    placeholder_token: str  # "<cat-toy>"
    learned_embeddings: Float32[np.ndarray, "num_vectors dim"]
    # For the second text encoder of a model with two: SDXL's OpenCLIP bigG, beside its CLIP-L.
    # As many vectors as for the first: files may say otherwise, so it is checked in words below.
    learned_embeddings_2: Float32[np.ndarray, "num_vectors_2 dim_2"] | None = None
    embedding_fingerprint: str = ""  # of the first encoder; "" where the origin does not say
    metadata: Mapping[str, str] = field(default_factory=dict)
    # In the concept store that it was loaded from; 0: from none. No file has it.
    version: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_placeholder_token(self.placeholder_token)
        for vectors in self.encoders:
            _check_vectors(self.placeholder_token, vectors)
        counts = [len(vectors) for vectors in self.encoders]
        if len(set(counts)) > 1:
            raise ConceptUnreadable(
                f"concept {self.placeholder_token!r} has {counts[0]} vectors for the first text "
                f"encoder and {counts[1]} for the second; they stand in the same places of a "
                "prompt, so both need the same number"
            )

    @property
    def encoders(self) -> tuple[Float32[np.ndarray, "_ _"], ...]:
        """The vectors for each text encoder in turn: one array, or two."""
        second = self.learned_embeddings_2
        return (self.learned_embeddings,) if second is None else (self.learned_embeddings, second)

    @property
    def num_vectors(self) -> int:
        return self.learned_embeddings.shape[0]

    @property
    def dim(self) -> int:
        return self.learned_embeddings.shape[1]

    @property
    def dims(self) -> tuple[int, ...]:
        """The width for each text encoder: (768,), or (768, 1280) in SDXL."""
        return tuple(vectors.shape[1] for vectors in self.encoders)

    @property
    def concept_id(self) -> str:
        """Its identity, as hex: the SHA-256 of num_vectors and dim (int64), then the values
        (float32, row after row), all little-endian; then the same of a second encoder."""
        digest = hashlib.sha256()
        for vectors in self.encoders:
            digest.update(struct.pack("<qq", *vectors.shape) + _vector_bytes(vectors))
        return digest.hexdigest()


def _vector_bytes(vectors: Float32[np.ndarray, "num_vectors dim"]) -> bytes:
    return np.ascontiguousarray(vectors, dtype="<f4").tobytes()


def check_placeholder_token(token: str) -> None:
    """Refuse tokens that the prompt syntax, a log line or a reader could mistake."""
    if not 1 <= len(token) <= MAX_PLACEHOLDER_LENGTH:
        raise ConceptUnreadable(
            f"placeholder token must have 1 to {MAX_PLACEHOLDER_LENGTH} characters, "
            f"got {len(token)}",
            field="placeholder_token",
        )
    if not _TOKEN.fullmatch(token) or any(map(_is_invisible, token)) or token in _RESERVED_TOKENS:
        raise ConceptUnreadable(
            f"placeholder token {token!a} is not allowed: it may have no white space, no control, "
            "unassigned or invisible characters, none of \\ ( ) [ ] : , and < only as its first, > "
            "only as its last character; choose a name such as <cat-toy>",
            field="placeholder_token",
        )
    if not unicodedata.is_normalized("NFC", token):
        raise ConceptUnreadable(
            f"placeholder token {token!a} is not in Unicode's normal form NFC, so that a name that "
            f"looks the same would be another one; use {unicodedata.normalize('NFC', token)!a}",
            field="placeholder_token",
        )


def _is_invisible(character: str) -> bool:
    # C: control, format, surrogate, private and unassigned characters; Z: spaces and separators.
    return unicodedata.category(character)[0] in "CZ" or _BLANK.match(character) is not None


def _check_vectors(token: str, vectors: Float32[np.ndarray, "num_vectors dim"]) -> None:
    num_vectors, dim = vectors.shape
    if not 1 <= num_vectors <= MAX_NUM_VECTORS or not 1 <= dim <= MAX_DIM:
        raise ConceptUnreadable(
            f"concept {token!r} has {num_vectors} vectors of width {dim}; "
            f"allowed are 1 to {MAX_NUM_VECTORS} vectors of width 1 to {MAX_DIM}"
        )
    if not np.isfinite(vectors).all():
        raise ConceptUnreadable(
            f"concept {token!r} contains NaN or infinite values; learn or export it again"
        )


def check_fits(
    concept: Concept, text: TextSpec, *, model_name: str, text_2: TextSpec | None = None
) -> None:
    """Raise `ConceptMismatch` unless the concept was learned on this model's text encoders.

    A fingerprint that is absent (files of other tools have none) leaves the width to decide.
    """
    wanted = (text.dim,) if text_2 is None else (text.dim, text_2.dim)
    if concept.dims != wanted:
        raise ConceptMismatch(
            f"concept {concept.placeholder_token!r} has vectors of width "
            f"{_named_widths(concept.dims)}, model {model_name!r} wants {_named_widths(wanted)}; "
            "use a concept learned on this model"
        )
    fingerprint = concept.embedding_fingerprint
    if fingerprint and fingerprint != text.embedding_fingerprint:
        raise ConceptMismatch(
            f"concept {concept.placeholder_token!r} was learned on a text encoder with fingerprint "
            f"{fingerprint[:12]}..., model {model_name!r} has "
            f"{text.embedding_fingerprint[:12]}...; use a concept learned on this model"
        )
    if concept.num_vectors > text.max_tokens - 2:
        raise ConceptMismatch(
            f"concept {concept.placeholder_token!r} has {concept.num_vectors} vectors, the text "
            f"encoder of model {model_name!r} has room for {text.max_tokens - 2} in a chunk"
        )


# Widths of the token embeddings: CLIP ViT-L/14, OpenCLIP ViT-H/14, ViT-L/14 with ViT-bigG/14, and
# LDMBert.
_FAMILIES: dict[tuple[int, ...], str] = {
    (768,): "Stable Diffusion 1.x",
    (1024,): "Stable Diffusion 2.x",
    (768, 1280): "SDXL",
    (1280,): "latent diffusion",
}


def _named_widths(dims: tuple[int, ...]) -> str:
    widths = " + ".join(map(str, dims))
    return f"{widths} (as {_FAMILIES[dims]})" if dims in _FAMILIES else widths


def read_concept(path: Path, *, placeholder_token: str | None = None) -> Concept:
    """Read a safetensors file in our or diffusers' format; see `concept_from_bytes`."""
    content = read_concept_file(path)
    return concept_from_bytes(content, source=str(path), placeholder_token=placeholder_token)


def read_concept_file(path: Path) -> bytes:
    """The bytes of a file that is small enough for a concept."""
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_FILE_BYTES else b""
    except OSError as error:
        raise ConceptUnreadable(f"{path} cannot be read: {error.strerror}") from error
    if size > MAX_FILE_BYTES:
        raise ConceptUnreadable(
            f"{path} has {size} bytes, a concept file has at most {MAX_FILE_BYTES}; "
            "is it a whole model?"
        )
    return content


def concept_from_bytes(
    content: bytes, *, source: str, placeholder_token: str | None = None
) -> Concept:
    """Read a concept from the bytes of a file; the content decides, never a file's suffix.

    `placeholder_token` renames the concept. Raises `ConceptUnreadable` that names `source`.
    """
    tensors, metadata = read_safetensors(content, source)
    if metadata.get("format") == FORMAT:
        return _from_own_format(tensors, metadata, source, placeholder_token)
    return _from_diffusers(tensors, source, placeholder_token)


def read_safetensors(content: bytes, source: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors (bfloat16 widened to float32) and metadata; a pickle, or a later version of our
    format, is refused."""
    if len(content) > MAX_FILE_BYTES:
        raise ConceptUnreadable(
            f"{source} has {len(content)} bytes, a concept file has at most {MAX_FILE_BYTES}"
        )
    _refuse_pickle(content, source)
    try:
        entries = deserialize(content)
        metadata = _read_metadata(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConceptUnreadable(
            f"{source} is not a safetensors file or is truncated: {error}"
        ) from error
    _refuse_other_version(metadata, source)
    return {name: _as_array(entry, source) for name, entry in entries}, metadata


def _refuse_other_version(metadata: Mapping[str, str], source: str) -> None:
    file_format = metadata.get("format", "")
    if file_format.startswith(_FORMAT_FAMILY) and file_format != FORMAT:
        raise ConceptUnreadable(
            f"{source} is of the format {quoted(file_format)}, this version reads {FORMAT!r}; "
            "read it with the version that wrote it, and export it as diffusers' format"
        )


def _as_array(entry: Mapping[str, Any], source: str) -> np.ndarray:
    """A tensor of the file; bfloat16, which NumPy lacks, as the float32 whose upper half it is."""
    dtype, shape, data = entry["dtype"], entry["shape"], entry["data"]
    if dtype == "BF16":
        return widened_bfloat16(np.frombuffer(data, "<u2")).reshape(shape)
    if dtype not in _NUMPY_DTYPES:
        raise ConceptUnreadable(
            f"{source} holds {dtype} values, a concept has {', '.join((*_NUMPY_DTYPES, 'BF16'))}; "
            "convert it to float32"
        )
    return np.frombuffer(data, _NUMPY_DTYPES[dtype]).reshape(shape)


def widened_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers whose upper halves are `bits` (uint16, either byte order); exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _refuse_pickle(content: bytes, source: str) -> None:
    # A zip archive (torch.save) or a bare pickle of protocol 2 and later. A safetensors file can
    # begin so too (by the length of its header), but has a brace where those two cannot have one.
    if content[8:9] != b"{" and content[:2] in _PICKLE_BEGINNINGS:
        raise ConceptUnreadable(
            f"{source} is a pickle, whatever its name; pickles can run code and are never loaded; "
            "convert it with `oneword concepts export`, which reads tensors alone, or where it "
            "came from"
        )


def _read_metadata(content: bytes) -> dict[str, str]:
    (header_length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + header_length]).get("__metadata__") or {}


def _from_own_format(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    source: str,
    placeholder_token: str | None,
) -> Concept:
    if set(tensors) not in ({TENSOR_NAME}, {TENSOR_NAME, TENSOR_NAME_2}):
        raise ConceptUnreadable(
            f"{source} holds the tensors {', '.join(map(quoted, sorted(tensors)[:5]))}; "
            f"expected is {TENSOR_NAME!r}, and {TENSOR_NAME_2!r} for a second text encoder"
        )
    second = tensors.get(TENSOR_NAME_2)
    concept = Concept(
        placeholder_token=placeholder_token or metadata.get("placeholder_token", ""),
        learned_embeddings=as_vectors(tensors[TENSOR_NAME], source),
        learned_embeddings_2=None if second is None else as_vectors(second, source),
        embedding_fingerprint=metadata.get("embedding_fingerprint", ""),
    )
    derived = derived_metadata(concept)
    rest = {name: value for name, value in metadata.items() if name not in derived}
    return replace(concept, metadata=rest)


def _from_diffusers(
    tensors: Mapping[str, np.ndarray], source: str, placeholder_token: str | None
) -> Concept:
    """One tensor [dim] or [num_vectors, dim] whose key is the token, as diffusers'
    `textual_inversion.py` saves it."""
    if len(tensors) != 1:
        raise ConceptUnreadable(
            f"{source} holds {len(tensors)} tensors, a diffusers concept holds one named after its "
            "placeholder token"
        )
    ((token, vectors),) = tensors.items()
    refuse_unusable_keys(tensors.keys(), source)
    if token in KEYS_WITHOUT_A_NAME and not placeholder_token:
        raise ConceptUnreadable(
            f"{source} does not say its placeholder token (its key is {token!r}); name one, for "
            "instance --placeholder-token '<cat-toy>'",
            field="placeholder_token",
        )
    return Concept(
        placeholder_token=placeholder_token or token,
        learned_embeddings=as_vectors(vectors, source),
    )


def refuse_unusable_keys(keys: Collection[str], source: str) -> None:
    """Refuse vectors for what no model here has: T5, or (OneTrainer) a text encoder's *output*."""
    if t5 := sorted(set(keys) & {*KEYS_OF_T5}):
        raise ConceptUnreadable(
            f"{source} holds {', '.join(t5)}: vectors for a T5 text encoder, which no supported "
            "model has; learn the word on a Stable Diffusion or latent diffusion model"
        )
    if outputs := sorted(
        key for key in keys if key.removesuffix(_OUTPUT) in {*KEYS_WITHOUT_A_NAME} - {key}
    ):
        raise ConceptUnreadable(
            f"{source} holds {', '.join(outputs)}: vectors for the output of the text encoder, "
            "which nothing here can use; learn it without output embeddings (OneTrainer's "
            "is_output_embedding)"
        )


def as_vectors(array: np.ndarray, source: str) -> Float32[np.ndarray, "num_vectors dim"]:
    """A tensor [dim] or [num_vectors, dim] of a file as a concept's vectors."""
    if array.ndim not in (1, 2):
        raise ConceptUnreadable(
            f"{source} holds a tensor of shape {list(array.shape)}, expected [num_vectors, dim]"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and is refused as such
        return np.atleast_2d(array).astype(np.float32)


def concept_to_bytes(concept: Concept, file_format: FileFormat = "oneword") -> bytes:
    """The bytes of a concept file, always the same. `diffusers` keeps token and vectors only."""
    if file_format == "diffusers":
        if concept.learned_embeddings_2 is not None:
            raise InvalidRequest(
                f"concept {concept.placeholder_token!r} is for two text encoders, diffusers keeps "
                "one to a file; take OneWord's own format, or let `oneword concepts export` write "
                "diffusers' two files",
                field="format",
            )
        return save_safetensors({concept.placeholder_token: _contiguous(concept)[0]})
    return sorted_safetensors(
        dict(zip((TENSOR_NAME, TENSOR_NAME_2), _contiguous(concept), strict=False)),
        metadata={**concept.metadata, **derived_metadata(concept)},
    )


def _contiguous(concept: Concept) -> tuple[Float32[np.ndarray, "_ _"], ...]:
    return tuple(np.ascontiguousarray(vectors) for vectors in concept.encoders)


def sorted_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file that is the same for the same content."""
    return _with_sorted_header(save_safetensors(dict(tensors), metadata=dict(metadata)))


def _with_sorted_header(content: bytes) -> bytes:
    # safetensors writes metadata in the random order of a Rust hash map.
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def derived_metadata(concept: Concept) -> dict[str, str]:
    """What a file of ours says by itself. ModelSpec's `architecture` is the trainer's to say."""
    tensor_bytes = b"".join(map(_vector_bytes, concept.encoders))
    tensor_digest = hashlib.sha256(tensor_bytes).hexdigest()
    return {
        "format": FORMAT,
        "placeholder_token": concept.placeholder_token,
        "embedding_fingerprint": concept.embedding_fingerprint,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://arxiv.org/abs/2208.01618",
        "modelspec.title": concept.placeholder_token,
        "modelspec.trigger_phrase": concept.placeholder_token,
        "modelspec.hash_sha256": f"0x{tensor_digest}",
    }


def write_concept(concept: Concept, path: Path, file_format: FileFormat = "oneword") -> None:
    """Write a concept file, whole or not at all."""
    if file_format not in ("oneword", "diffusers"):
        raise InvalidRequest(f"unknown format {quoted(file_format)}; known: oneword, diffusers")
    write_atomically(path, concept_to_bytes(concept, file_format))
