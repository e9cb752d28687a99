"""Concept files for other tools: written, read again, and read by diffusers' own loader."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from engine.concepts import Concept
from engine.dialects.writers import DIALECTS, Dialect, write_dialect
from engine.errors import InvalidRequest
from tests.dialect_files import DIM, VECTORS, VECTORS_2, a1111, assert_holds, only, save_torch
from tests.tiny_model import make_tiny_model


def made(two: bool, **changes: Any) -> Concept:
    fields: dict[str, Any] = {
        "placeholder_token": "fox",
        "learned_embeddings": VECTORS.numpy(),
        "learned_embeddings_2": VECTORS_2.numpy() if two else None,
    }
    return Concept(**(fields | changes))


def through(concept: Concept, dialect: Dialect, folder: Path) -> Concept:
    """The concept written for a tool, in a file of its own name, and read again."""
    suffix = ".pt" if dialect == "a1111-pt" else ".safetensors"
    path = folder / dialect / f"{concept.placeholder_token}{suffix}"
    paths = write_dialect(concept, path, dialect)
    return only(paths[0], path_2=paths[1] if len(paths) > 1 else None)


@pytest.mark.parametrize("two", [False, True], ids=["one encoder", "two encoders"])
@pytest.mark.parametrize("first", DIALECTS)
def test_every_pair_of_tools_passes_a_concept_on(first: Dialect, two: bool, tmp_path: Path) -> None:
    if two and first == "a1111-pt":
        with pytest.raises(InvalidRequest, match="vectors for one; export it as a1111"):
            through(made(two), first, tmp_path)
        return
    concept = through(made(two), first, tmp_path)
    for second in DIALECTS:
        if not (two and second == "a1111-pt"):
            passed_on = through(concept, second, tmp_path)
            assert_holds(passed_on, "fox", VECTORS, VECTORS_2 if two else None)
            assert passed_on.concept_id == made(two).concept_id


@pytest.mark.parametrize("dialect", ["oneword", "a1111", "kohya", "onetrainer", "comfyui"])
def test_safetensors_for_other_tools_lose_nothing(dialect: Dialect, tmp_path: Path) -> None:
    metadata = {"steps": "400", "ss_seed": "1"}
    concept = made(
        True, placeholder_token="<fox>", embedding_fingerprint="f" * 64, metadata=metadata
    )
    (path,) = write_dialect(concept, tmp_path / "another-name.safetensors", dialect)
    found = only(path)
    assert (found.placeholder_token, found.embedding_fingerprint) == ("<fox>", "f" * 64)
    assert found.metadata == metadata


def test_a1111_pt_keeps_what_it_has_room_for(tmp_path: Path) -> None:
    original = only(save_torch(a1111(), tmp_path / "fox.pt"))
    (path,) = write_dialect(original, tmp_path / "again" / "fox.pt", "a1111-pt")
    loaded = torch.load(path, weights_only=True)
    for name, value in a1111(name="fox").items():
        if name == "string_to_param":
            torch.testing.assert_close(loaded[name], {"*": VECTORS}, rtol=0, atol=0)
        else:
            assert loaded[name] == value


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


@pytest.mark.parametrize(
    ("dialect", "one", "two"),
    [
        ("a1111", {"emb_params"}, {"clip_l", "clip_g"}),
        ("kohya", {"emb_params"}, {"clip_l", "clip_g"}),
        ("comfyui", {"emb_params"}, {"clip_l", "clip_g"}),
        ("onetrainer", {"emp_params"}, {"clip_l", "clip_g"}),
        ("oneword", {"text_encoder"}, {"text_encoder", "text_encoder_2"}),
    ],
)
def test_tensors_are_called_as_the_tool_calls_them(
    dialect: Dialect, one: set[str], two: set[str], tmp_path: Path
) -> None:
    for keys, concept in ((one, made(False)), (two, made(True))):
        (path,) = write_dialect(concept, tmp_path / "fox.safetensors", dialect)
        assert header_of(path).keys() == keys | {"__metadata__"}
        before = path.read_bytes()
        write_dialect(concept, path, dialect)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("dim", "dim_2", "architecture"),
    [
        (768, None, "stable-diffusion-v1/textual-inversion"),
        (768, 1280, "stable-diffusion-xl-v1-base/textual-inversion"),
        (1024, None, None),  # v2-512 or v2-768-v: the width does not tell
        (24, None, None),
    ],
)
def test_an_architecture_is_told_where_the_widths_tell_it(
    dim: int, dim_2: int | None, architecture: str | None, tmp_path: Path
) -> None:
    second = None if dim_2 is None else np.ones((1, dim_2), np.float32)
    vectors = np.ones((1, dim), np.float32)
    concept = made(False, learned_embeddings=vectors, learned_embeddings_2=second)
    (path,) = write_dialect(concept, tmp_path / "x.safetensors", "kohya")
    metadata = header_of(path)["__metadata__"]
    assert metadata.get("modelspec.architecture") == architecture
    assert metadata["modelspec.trigger_phrase"] == "fox"
    told = made(False, metadata={"modelspec.architecture": "mine/textual-inversion"})
    (path,) = write_dialect(told, path, "kohya")
    assert header_of(path)["__metadata__"]["modelspec.architecture"] == "mine/textual-inversion"


@pytest.mark.parametrize(
    ("name", "dialect"),
    [("x.pt", "a1111"), ("x.bin", "diffusers"), ("x.safetensors", "a1111-pt"), ("x", "a1111-pt")],
)
def test_a_suffix_that_says_otherwise_is_refused(
    name: str, dialect: Dialect, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="by its suffix as something else; name it x"):
        write_dialect(made(False), tmp_path / name, dialect)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", dim=DIM)
    load: Any = StableDiffusionPipeline.from_pretrained
    return load(path, safety_checker=None)


@pytest.mark.parametrize("dialect", ["diffusers", "a1111", "a1111-pt", "kohya", "onetrainer"])
def test_diffusers_loads_what_we_write(pipe: Any, dialect: Dialect, tmp_path: Path) -> None:
    token = f"<{dialect}>"
    path = tmp_path / ("x.pt" if dialect == "a1111-pt" else "x.safetensors")
    (path,) = write_dialect(made(False, placeholder_token=token), path, dialect)
    named_inside = dialect in ("diffusers", "a1111-pt")
    pipe.load_textual_inversion(
        str(tmp_path), weight_name=path.name, token=None if named_inside else token
    )
    ids = pipe.tokenizer.convert_tokens_to_ids([token, f"{token}_1"])
    table = pipe.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(table[ids].detach(), VECTORS, rtol=0, atol=0)


def test_each_of_diffusers_two_files_is_one_that_it_loads(pipe: Any, tmp_path: Path) -> None:
    concept = made(True, placeholder_token="<two>", learned_embeddings_2=VECTORS.numpy() * 2)
    first, second = write_dialect(concept, tmp_path / "learned_embeds.safetensors", "diffusers")
    assert second.name == "learned_embeds_2.safetensors"
    for path, factor in ((first, 1), (second, 2)):
        pipe.load_textual_inversion(str(tmp_path), weight_name=path.name, token=f"<two{factor}>")
        ids = pipe.tokenizer.convert_tokens_to_ids([f"<two{factor}>", f"<two{factor}>_1"])
        table = pipe.text_encoder.get_input_embeddings().weight
        torch.testing.assert_close(table[ids].detach(), VECTORS * factor, rtol=0, atol=0)
