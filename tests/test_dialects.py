"""Concept files of other tools, made the way each tool makes them, and read."""

from pathlib import Path

import pytest
import torch

from engine.dialects.readers import read_concepts
from engine.errors import ConceptUnreadable
from tests.dialect_files import (
    VECTORS,
    VECTORS_2,
    a1111,
    assert_holds,
    both_containers,
    only,
    save_safe,
    save_torch,
)


def test_diffusers_one_vector_without_an_axis(tmp_path: Path) -> None:
    """examples/textual_inversion of 2022: a vector without an axis."""
    found = only(save_safe({"<cat-toy>": VECTORS[0]}, tmp_path / "learned_embeds.safetensors"))
    assert_holds(found, "<cat-toy>", VECTORS[:1])


@both_containers
def test_diffusers_bin(zipped: bool, tmp_path: Path) -> None:
    path = save_torch({"<cat-toy>": VECTORS}, tmp_path / "learned_embeds.bin", zipped)
    assert_holds(only(path), "<cat-toy>", VECTORS)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_several_words_in_one_file(suffix: str, tmp_path: Path) -> None:
    path, words = tmp_path / f"x{suffix}", {"<a>": VECTORS[:1], "<b>": VECTORS[1].clone()}
    save_safe(words, path) if suffix == ".safetensors" else save_torch(words, path)
    first, second = sorted(read_concepts(path), key=lambda concept: concept.placeholder_token)
    assert_holds(first, "<a>", VECTORS[:1])
    assert_holds(second, "<b>", VECTORS[1:])
    with pytest.raises(ConceptUnreadable, match="holds 2 concepts, and one name"):
        read_concepts(path, placeholder_token="<c>")


def test_diffusers_two_files_of_an_sdxl_concept(tmp_path: Path) -> None:
    path = save_safe({"<x>": VECTORS}, tmp_path / "learned_embeds.safetensors")
    path_2 = save_safe({"<x>": VECTORS_2}, tmp_path / "learned_embeds_2.safetensors")
    assert_holds(only(path, path_2=path_2), "<x>", VECTORS, VECTORS_2)
    renamed = only(path, path_2=path_2, placeholder_token="<y>")
    assert_holds(renamed, "<y>", VECTORS, VECTORS_2)
    other = save_safe({"<z>": VECTORS_2}, tmp_path / "other.safetensors")
    with pytest.raises(ConceptUnreadable, match="not of the same concepts: <x> there, <z> here"):
        read_concepts(path, path_2=other)
    both = save_safe({"clip_l": VECTORS, "clip_g": VECTORS_2}, tmp_path / "both.safetensors")
    with pytest.raises(ConceptUnreadable, match="two text encoders already"):
        read_concepts(both, path_2=path, placeholder_token="<x>")


@both_containers
def test_a1111_pt_goes_by_the_name_of_its_file(zipped: bool, tmp_path: Path) -> None:
    found = only(save_torch(a1111(), tmp_path / "my-style.pt", zipped))
    assert_holds(found, "my-style", VECTORS)
    notes = {"name": "my-style-2500", "step": "2500", "sd_checkpoint": "a9263745"}
    assert found.metadata == notes


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_kohya_and_a1111_emb_params(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"fox{suffix}"
    if suffix == ".pt":  # --save_model_as pt
        save_torch({"emb_params": VECTORS}, path)
    else:
        save_safe({"emb_params": VECTORS}, path, ss_steps="1600", format="pt")
    found = only(path)
    assert_holds(found, "fox", VECTORS)
    assert found.metadata == ({} if suffix == ".pt" else {"ss_steps": "1600"})
    assert only(path, placeholder_token="<fox>").placeholder_token == "<fox>"


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_two_encoders_in_one_file(keys: tuple[str, str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"fox{suffix}"
    tensors = dict(zip(keys, (VECTORS, VECTORS_2), strict=True))
    save_safe(tensors, path) if suffix == ".safetensors" else save_torch(tensors, path)
    assert_holds(only(path), "fox", VECTORS, VECTORS_2)


def test_onetrainer(tmp_path: Path) -> None:
    assert_holds(
        only(save_safe({"emp_params": VECTORS}, tmp_path / "fox.safetensors")), "fox", VECTORS
    )


@pytest.mark.parametrize("keys", [("emp_params", "emp_params_out"), ("clip_l_out", "clip_g_out")])
def test_onetrainer_output_vectors_are_refused(keys: tuple[str, str], tmp_path: Path) -> None:
    path = save_safe(dict.fromkeys(keys, VECTORS.clone()) | {keys[1]: VECTORS_2}, tmp_path / "x.pt")
    with pytest.raises(ConceptUnreadable, match="_out: vectors for the output of the text encoder"):
        read_concepts(path)


@both_containers
def test_the_original_repository_s_manager(zipped: bool, tmp_path: Path) -> None:
    """`EmbeddingManager.save` of rinongal/textual_inversion, with per-image tokens."""
    words = {"*": VECTORS, "\u05d0": VECTORS + 1, "\u05d1": VECTORS + 2}
    parameters = {word: torch.nn.Parameter(vectors) for word, vectors in words.items()}
    manager = {
        "string_to_token": {word: torch.tensor(265) for word in words},
        "string_to_param": torch.nn.ParameterDict(parameters),
    }
    found = read_concepts(save_torch(manager, tmp_path / "embeddings_gs-4999.pt", zipped))
    assert len(found) == 3
    for concept, (word, vectors) in zip(found, words.items(), strict=True):
        assert_holds(concept, word, vectors)


def test_the_manager_of_one_word_is_called_by_it(tmp_path: Path) -> None:
    parameters = torch.nn.ParameterDict({"sculpture": torch.nn.Parameter(VECTORS)})
    manager = {"string_to_token": {"sculpture": 7}, "string_to_param": parameters}
    assert_holds(only(save_torch(manager, tmp_path / "embeddings.pt")), "sculpture", VECTORS)


def test_a_bare_tensor(tmp_path: Path) -> None:
    assert_holds(only(save_torch(VECTORS[0], tmp_path / "fox.pt")), "fox", VECTORS[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_precision(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    """Narrow numbers are kept exactly; wide ones are rounded once, and the concept says so."""
    path, vectors = tmp_path / f"fox{suffix}", (VECTORS.double() / 3).to(dtype)
    tensors = {"<x>": vectors}
    save_safe(tensors, path) if suffix == ".safetensors" else save_torch(tensors, path)
    found = only(path)
    assert_holds(found, "<x>", vectors.float())
    assert found.metadata == ({"rounded_from": "float64"} if dtype == torch.float64 else {})


def test_the_content_decides_what_a_file_is(tmp_path: Path) -> None:
    path = save_safe({"<x>": VECTORS}, tmp_path / "x.pt")
    assert_holds(only(path), "<x>", VECTORS)


@both_containers
@pytest.mark.parametrize("name", ["x.safetensors", "x.SafeTensors", "x", "x.png"])
def test_a_pickle_must_be_called_one(zipped: bool, name: str, tmp_path: Path) -> None:
    path = save_torch({"<x>": VECTORS}, tmp_path / name, zipped)
    with pytest.raises(ConceptUnreadable, match="is a pickle, whatever its name"):
        read_concepts(path)


def test_a_decomposed_file_name_is_composed(tmp_path: Path) -> None:
    path = save_safe({"emb_params": VECTORS}, tmp_path / "cafe\u0301.safetensors")
    assert only(path).placeholder_token == "caf\u00e9"


@pytest.mark.parametrize("name", ["my style (v2)", "a,b", "x" * 70])
def test_a_file_name_that_cannot_be_a_word(name: str, tmp_path: Path) -> None:
    path = save_safe({"emb_params": VECTORS}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConceptUnreadable, match="does not say its .*--placeholder-token"):
        read_concepts(path)
    assert only(path, placeholder_token="<fox>").placeholder_token == "<fox>"


MANY = {f"<{index}>": VECTORS for index in range(101)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "holds 0 concepts"),
        ([VECTORS], "neither a dictionary nor a tensor"),
        (MANY, "at most 100; is it a model or a LoRA"),
        ({"<x>": 3}, "'<x>', which is not a tensor"),
        ({3: VECTORS}, "'3', which is not a tensor with a name"),
        ({"<x>": {"deep": VECTORS}}, "'<x>', which is not a tensor"),
        ({"<x>": VECTORS.to(torch.int64)}, "holds int64 values"),
        ({"<x>": VECTORS[None, None]}, r"shape \[1, 1, 2, 24\]"),
        ({"<x>": VECTORS * float("nan")}, "NaN"),
        ({"<x>": torch.full((1, 4), 1e300, dtype=torch.float64)}, "infinite"),
        ({"<x>": torch.zeros(80, 4)}, "80 vectors"),
        ({"<x>": torch.zeros(0, 4)}, "0 vectors"),
        ({"a b": VECTORS}, "not allowed"),
        ({"": VECTORS}, "1 to 64 characters"),
        ({"clip_g": VECTORS}, "'clip_g' belongs with 'clip_l'"),
        ({"clip_l": VECTORS, "clip_g": VECTORS, "t5xxl": VECTORS}, "t5xxl: vectors for a T5"),
        ({"clip_l": VECTORS, "clip_g": VECTORS[:1]}, "2 vectors for the first .* and 1 for the"),
        ({"t5xxl": VECTORS}, "t5xxl: vectors for a T5"),
        ({"emb_params": VECTORS, "<x>": VECTORS}, "do not make a concept together"),
        ({"string_to_param": VECTORS}, "string_to_param that is not a dictionary"),
        ({"string_to_param": {}}, "holds 0 concepts"),
        ({"string_to_param": {"*": 1}}, "which is not a tensor"),
        (a1111(extra=VECTORS), "'extra' beside string_to_param"),
        (a1111(optimizer={"state": []}), "'optimizer' beside string_to_param"),
    ],
)
def test_what_is_no_concept_is_refused(value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConceptUnreadable, match=message):
        read_concepts(save_torch(value, tmp_path / "x.pt"))
