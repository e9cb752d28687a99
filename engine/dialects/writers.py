"""Concepts written as the files of other tools; what each calls its entries: `readers`.

A file in another tool's safetensors format carries our metadata and ModelSpec's beside the tensors,
which those tools skip, so that a concept comes back as it left. diffusers' own files and `.pt` have
no room for it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from engine.concepts import Concept, concept_to_bytes, derived_metadata, sorted_safetensors
from engine.dialects.readers import ANY_WORD, STRING_TO_PARAM, STRING_TO_TOKEN, TORCH_SUFFIXES
from engine.dialects.torch_archive_writer import torch_archive
from engine.errors import InvalidRequest, quoted
from engine.files import write_atomically

Dialect = Literal["oneword", "diffusers", "a1111", "a1111-pt", "kohya", "onetrainer", "comfyui"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
# Tools for which a concept is called as its file is, whatever stands in it.
NAMED_BY_FILE: tuple[Dialect, ...] = ("a1111", "a1111-pt", "kohya", "onetrainer", "comfyui")
_ID_OF_ANY_WORD = 265  # the id of "*" in CLIP's vocabulary, which AUTOMATIC1111 writes

# ModelSpec's names for what can be told by width: SD 2 has two, by resolution, and is left out.
_ARCHITECTURES: dict[tuple[int, ...], str] = {
    (768,): "stable-diffusion-v1/textual-inversion",
    (768, 1280): "stable-diffusion-xl-v1-base/textual-inversion",
}


def write_dialect(concept: Concept, path: Path, dialect: Dialect) -> tuple[Path, ...]:
    """Write a concept for a tool; the paths, two where the tool has a file for each text encoder.

    Each file is whole or absent. Raises `InvalidRequest` for a suffix by which the tool would
    read it as something else, and where the tool has no such format.
    """
    if dialect not in _WRITERS:
        raise InvalidRequest(f"unknown format {quoted(dialect)}; known: {', '.join(DIALECTS)}")
    if (path.suffix.lower() in TORCH_SUFFIXES) != (dialect == "a1111-pt"):
        suffix = ".pt" if dialect == "a1111-pt" else ".safetensors"
        raise InvalidRequest(
            f"{path} would be read by its suffix as something else; name it {path.stem}{suffix}",
            field="output",
        )
    contents = _WRITERS[dialect](concept)
    paths = (path, path.with_name(f"{path.stem}_2{path.suffix}"))[: len(contents)]
    for target, content in zip(paths, contents, strict=True):
        write_atomically(target, content)
    return paths


def _oneword(concept: Concept) -> tuple[bytes, ...]:
    return (concept_to_bytes(concept),)


def _diffusers(concept: Concept) -> tuple[bytes, ...]:
    """`learned_embeds`, and `learned_embeds_2` for a second text encoder."""
    return tuple(
        concept_to_bytes(
            Concept(placeholder_token=concept.placeholder_token, learned_embeddings=vectors),
            "diffusers",
        )
        for vectors in concept.encoders
    )


def _emb_params(concept: Concept) -> tuple[bytes, ...]:
    return _flat(concept, "emb_params")


def _emp_params(concept: Concept) -> tuple[bytes, ...]:
    return _flat(concept, "emp_params")


def _flat(concept: Concept, key: str) -> tuple[bytes, ...]:
    """One file: `key`, or `clip_l` and `clip_g` for two text encoders."""
    keys = (key,) if concept.learned_embeddings_2 is None else ("clip_l", "clip_g")
    tensors = {
        name: np.ascontiguousarray(vectors)
        for name, vectors in zip(keys, concept.encoders, strict=True)
    }
    return (sorted_safetensors(tensors, _metadata(concept)),)


def _metadata(concept: Concept) -> dict[str, str]:
    known = concept.dims in _ARCHITECTURES
    architecture = {"modelspec.architecture": _ARCHITECTURES[concept.dims]} if known else {}
    metadata = {**architecture, **concept.metadata, **derived_metadata(concept)}
    del metadata["format"]  # of our own files alone
    return metadata


def _a1111_pt(concept: Concept) -> tuple[bytes, ...]:
    if concept.learned_embeddings_2 is not None:
        raise InvalidRequest(
            f"concept {concept.placeholder_token!r} is for two text encoders, AUTOMATIC1111's .pt "
            "has vectors for one; export it as a1111, which is a .safetensors file",
            field="format",
        )
    notes = concept.metadata
    step = notes.get("step", notes.get("steps", ""))
    value: Mapping[str, object] = {
        STRING_TO_TOKEN: {ANY_WORD: _ID_OF_ANY_WORD},
        STRING_TO_PARAM: {ANY_WORD: concept.learned_embeddings},
        "name": concept.placeholder_token,  # what diffusers goes by
        "step": int(step) if step.isascii() and step.isdigit() and len(step) < 19 else None,
        "sd_checkpoint": notes.get("sd_checkpoint"),
        "sd_checkpoint_name": notes.get("sd_checkpoint_name"),
    }
    return (torch_archive(value),)


_WRITERS: Mapping[Dialect, Callable[[Concept], tuple[bytes, ...]]] = {
    "oneword": _oneword,
    "diffusers": _diffusers,
    "a1111": _emb_params,
    "a1111-pt": _a1111_pt,
    "kohya": _emb_params,
    "onetrainer": _emp_params,
    "comfyui": _emb_params,
}
