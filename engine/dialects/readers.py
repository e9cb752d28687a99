"""Concept files of other tools, read.

| tool | entries of the file |
|---|---|
| diffusers | `<token>`: vectors, one or several; SDXL: a second file `learned_embeds_2` |
| AUTOMATIC1111 | `.pt`: `string_to_param` {"*": vectors}, `name`, `step`, ...; or as kohya |
| kohya | `emb_params`; SDXL: `clip_l`, `clip_g` |
| OneTrainer | `emp_params` (sic); SDXL: `clip_l`, `clip_g`; `..._out`: for the encoder's output |
| diffusers' pivotal tuning | `clip_l`, `clip_g`, before `text_encoders_0`, `text_encoders_1` |
| original repository | `string_to_token`, `string_to_param` {placeholder: vectors, ...} |

ComfyUI reads all of these, and calls a concept by the name of its file, as AUTOMATIC1111 and kohya
do. A `.pt` or `.bin` goes through `torch_archives`, which builds tensors and nothing else.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from engine.concepts import (
    FORMAT,
    KEYS_WITHOUT_A_NAME,
    Concept,
    as_vectors,
    check_placeholder_token,
    concept_from_bytes,
    derived_metadata,
    read_concept_file,
    read_safetensors,
    refuse_unusable_keys,
)
from engine.dialects.inert_pickles import Record
from engine.dialects.torch_archives import (
    PARAMETER_DICT,
    TorchArchive,
    TorchTensor,
    is_torch_archive,
    read_torch_archive,
)
from engine.errors import ConceptUnreadable, quoted

MAX_CONCEPTS = 100  # of one file; the original repository's per-image tokens are 22
TORCH_SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")
STRING_TO_PARAM, STRING_TO_TOKEN = "string_to_param", "string_to_token"
ANY_WORD = "*"  # AUTOMATIC1111 calls every concept so
_TWO_ENCODERS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A concept as a file has it: perhaps without a name."""

    token: str | None  # None where the file does not say
    vectors: np.ndarray
    vectors_2: np.ndarray | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_concepts(
    path: Path, *, placeholder_token: str | None = None, path_2: Path | None = None
) -> tuple[Concept, ...]:
    """Every concept of a file; the content decides what it is, and a pickle must be called one.

    `placeholder_token` renames the concept of a file that has one. `path_2` is the file for the
    second text encoder, where a tool writes two. Raises `ConceptUnreadable`.
    """
    concepts = _read_file(path, placeholder_token)
    if path_2 is None:
        return concepts
    return _joined(concepts, _read_file(path_2, placeholder_token), f"{path} and {path_2}")


def _read_file(path: Path, placeholder_token: str | None) -> tuple[Concept, ...]:
    content, source = read_concept_file(path), str(path)
    if is_torch_archive(content) and path.suffix.lower() in TORCH_SUFFIXES:
        entries = _of_archive(read_torch_archive(content, source=source), source)
    else:
        tensors, metadata = read_safetensors(content, source)
        if metadata.get("format") == FORMAT:
            return (
                concept_from_bytes(content, source=source, placeholder_token=placeholder_token),
            )
        entries = _of_tensors(tensors, metadata, source)
    if not 1 <= len(entries) <= MAX_CONCEPTS:
        raise ConceptUnreadable(
            f"{source} holds {len(entries)} concepts, a file has 1 to {MAX_CONCEPTS}; "
            "is it a model or a LoRA?"
        )
    if placeholder_token and len(entries) > 1:
        raise ConceptUnreadable(
            f"{source} holds {len(entries)} concepts, and one name cannot be given to all of them; "
            "read it without a name",
            field="placeholder_token",
        )
    return tuple(_concept(entry, path, placeholder_token) for entry in entries)


def _of_archive(archive: TorchArchive, source: str) -> tuple[_Entry, ...]:
    value = archive.value
    if isinstance(value, TorchTensor):  # torch.save(vectors, path)
        return (_Entry(token=None, vectors=archive.array(value)),)
    if not isinstance(value, dict):
        raise ConceptUnreadable(f"{source} holds neither a dictionary nor a tensor")
    if STRING_TO_PARAM in value:
        return _of_string_to_param(archive, value, source)
    return _of_tensors(_arrays(archive, value, source), {}, source)


def _of_string_to_param(
    archive: TorchArchive, value: Mapping[object, object], source: str
) -> tuple[_Entry, ...]:
    """AUTOMATIC1111's `.pt`, or the original repository's manager: one placeholder, or several."""
    params = value[STRING_TO_PARAM]
    if isinstance(params, Record) and params.class_name == PARAMETER_DICT:
        params = params.state.get("_parameters")
    if not isinstance(params, dict):
        raise ConceptUnreadable(f"{source} has a {STRING_TO_PARAM} that is not a dictionary")
    notes = _notes(value, source)
    return tuple(
        # AUTOMATIC1111 goes by the name of the file, and by no other.
        _Entry(token=None if token == ANY_WORD and len(params) == 1 else token,
               vectors=vectors, metadata=notes)
        for token, vectors in _arrays(archive, params, source).items()
    )  # fmt: skip


def _notes(value: Mapping[object, object], source: str) -> dict[str, str]:
    """The name, step, checkpoint and whatever else a `.pt` says of its vectors."""
    notes: dict[str, str] = {}
    for key, note in value.items():
        # The tokenizer's number of the placeholder means nothing to us: tokens are never ids.
        if key in (STRING_TO_PARAM, STRING_TO_TOKEN) or note is None:
            continue
        if not isinstance(note, (str, int, float)):
            raise ConceptUnreadable(
                f"{source} holds {quoted(str(key))} beside {STRING_TO_PARAM}, and it is neither "
                "text nor a number; is it a concept?"
            )
        notes[str(key)] = str(note)
    return notes


def _arrays(
    archive: TorchArchive, value: Mapping[object, object], source: str
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, TorchTensor):
            raise ConceptUnreadable(
                f"{source} holds {quoted(str(key))}, which is not a tensor with a name; expected "
                "are the vectors of a concept alone"
            )
        if len(arrays) == MAX_CONCEPTS:
            raise ConceptUnreadable(
                f"{source} holds {len(value)} tensors, a concept file has at most {MAX_CONCEPTS}; "
                "is it a model or a LoRA?"
            )
        arrays[key] = archive.array(tensor)
    return arrays


def _of_tensors(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], source: str
) -> tuple[_Entry, ...]:
    """A flat file: the keys are tokens, or say what text encoder the vectors are for."""
    keys = set(tensors)
    refuse_unusable_keys(keys, source)
    token = metadata.get("placeholder_token")  # in files of ours in other tools' formats
    for first, second in _TWO_ENCODERS:
        if keys == {first, second}:
            vectors, vectors_2 = tensors[first], tensors[second]
            return (_Entry(token=token, vectors=vectors, vectors_2=vectors_2, metadata=metadata),)
        if second in keys:
            raise ConceptUnreadable(_mixed(keys, source, f"{second!r} belongs with {first!r}"))
    if keys & {*KEYS_WITHOUT_A_NAME}:
        if len(keys) > 1:
            raise ConceptUnreadable(_mixed(keys, source, "they do not make a concept together"))
        return (_Entry(token=token, vectors=tensors[keys.pop()], metadata=metadata),)
    return tuple(
        _Entry(token=key, vectors=vectors, metadata=metadata) for key, vectors in tensors.items()
    )


def _mixed(keys: set[str], source: str, why: str) -> str:
    names = ", ".join(map(quoted, sorted(keys)[:5]))
    return (
        f"{source} holds the tensors {names}: {why}; expected are a token or emb_params "
        "(one text encoder), or clip_l and clip_g (SDXL)"
    )


def _concept(entry: _Entry, path: Path, placeholder_token: str | None) -> Concept:
    token = placeholder_token or (_token_of(path) if entry.token is None else entry.token)
    source, second = str(path), entry.vectors_2
    metadata = dict(entry.metadata)
    for vectors in (entry.vectors, second):
        if vectors is not None and vectors.dtype.kind != "f":
            raise ConceptUnreadable(
                f"{source} holds {vectors.dtype} values, a concept has floating-point numbers"
            )
        if vectors is not None and _loses_digits(vectors):
            metadata["rounded_from"] = str(vectors.dtype)
    concept = Concept(
        placeholder_token=token,
        learned_embeddings=as_vectors(entry.vectors, source),
        learned_embeddings_2=None if second is None else as_vectors(second, source),
        embedding_fingerprint=metadata.get("embedding_fingerprint", ""),
    )
    derived = derived_metadata(concept)
    return replace(
        concept, metadata={key: value for key, value in metadata.items() if key not in derived}
    )


def _loses_digits(vectors: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.any(vectors.astype(np.float32) != vectors))


def _token_of(path: Path) -> str:
    """The name of a concept whose file does not say it: the file's own, as AUTOMATIC1111 has it."""
    token = unicodedata.normalize("NFC", path.stem)  # some systems store names decomposed
    try:
        check_placeholder_token(token)
    except ConceptUnreadable as error:
        raise ConceptUnreadable(
            f"{path} does not say its placeholder token, and its own name cannot be one ({error}); "
            "name one, for instance --placeholder-token '<cat-toy>'",
            field="placeholder_token",
        ) from error
    return token


def _joined(
    concepts: tuple[Concept, ...], seconds: tuple[Concept, ...], source: str
) -> tuple[Concept, ...]:
    """The concepts of two files, one for each text encoder, as diffusers writes them for SDXL."""
    by_token = {concept.placeholder_token: concept for concept in seconds}
    tokens = [concept.placeholder_token for concept in concepts]
    if sorted(tokens) != sorted(by_token):
        raise ConceptUnreadable(
            f"{source} are not of the same concepts: {', '.join(tokens[:5])} there, "
            f"{', '.join([*by_token][:5])} here; if they are, name both with --placeholder-token",
            field="placeholder_token",
        )
    if any(len(concept.dims) > 1 for concept in (*concepts, *seconds)):
        raise ConceptUnreadable(f"{source}: one of them has vectors for two text encoders already")
    return tuple(
        replace(
            concept,
            learned_embeddings_2=by_token[concept.placeholder_token].learned_embeddings,
            metadata={**by_token[concept.placeholder_token].metadata, **concept.metadata},
        )
        for concept in concepts
    )
