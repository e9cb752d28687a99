"""Concept files of other tools: made the way each tool makes them, and read by its own loader."""

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import save_file

from engine.bundle import TextSpec
from engine.client import Client
from engine.concepts import Concept, check_fits, concept_from_bytes
from engine.dialect_writers import DIALECTS, NAMED_BY_FILE, Dialect, write_dialect
from engine.dialects import read_concepts
from engine.errors import ConceptMismatch, ConceptUnreadable, InvalidRequest
from oneword import concepts as oneword_concepts
from protos.oneword.v1 import concepts_pb2
from tests.tiny_model import make_tiny_model

DIM = 24  # of the tiny model
VECTORS = torch.linspace(-1, 1, 2 * DIM).reshape(2, DIM)
VECTORS_2 = torch.linspace(2, 3, 2 * 40).reshape(2, 40)
both_containers = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save_torch(value: object, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def save_safe(tensors: dict[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def only(path: Path, **options: Any) -> Concept:
    (concept,) = read_concepts(path, **options)
    return concept


def assert_holds(
    concept: Concept, token: str, vectors: torch.Tensor, second: torch.Tensor | None = None
) -> None:
    assert concept.placeholder_token == token
    np.testing.assert_array_equal(concept.learned_embeddings, vectors.numpy(), strict=True)
    if second is None:
        assert concept.learned_embeddings_2 is None
    else:
        np.testing.assert_array_equal(concept.learned_embeddings_2, second.numpy(), strict=True)


# In.


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


def a1111(**changes: object) -> dict[str, object]:
    """`Embedding.save` of AUTOMATIC1111's modules/textual_inversion."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": VECTORS.clone().requires_grad_()},
        "name": "my-style-2500",
        "step": 2500,
        "sd_checkpoint": "a9263745",
        "sd_checkpoint_name": None,
    } | changes


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
        ({"clip_l": VECTORS, "clip_g": VECTORS, "t5xxl": VECTORS}, "'t5xxl': 'clip_g' belongs"),
        ({"clip_l": VECTORS, "clip_g": VECTORS[:1]}, "2 vectors for the first .* and 1 for the"),
        ({"t5xxl": VECTORS}, "expected are a token or emb_params"),
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


# Out, and in again.


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


# diffusers' own loader.


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


# The command.


def oneword(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    oneword_concepts.add_arguments(parser)
    return oneword_concepts.run(parser.parse_args([*map(str, words)]))


def test_the_command_converts_a_pt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_torch(a1111(), tmp_path / "my-style.pt")
    output = tmp_path / "out.safetensors"
    oneword("export", path, "--placeholder-token", "<style>", "--output", output)
    assert_holds(concept_from_bytes(output.read_bytes(), source="out"), "<style>", VECTORS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dialect", NAMED_BY_FILE)
def test_the_command_says_what_the_tool_will_call_it(
    dialect: Dialect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_safe({"<x>": VECTORS}, tmp_path / "x.safetensors")
    output = tmp_path / ("fox.pt" if dialect == "a1111-pt" else "fox.safetensors")
    oneword("export", path, "--format", dialect, "--output", output)
    assert "file is called: fox, not <x>" in capsys.readouterr().err


def test_the_command_takes_one_of_several(tmp_path: Path) -> None:
    path = save_torch({"<a>": VECTORS, "<b>": VECTORS + 1}, tmp_path / "x.bin")
    output = tmp_path / "b.safetensors"
    with pytest.raises(InvalidRequest, match="holds <a>, <b>; choose one of them with --only"):
        oneword("export", path, "--output", output)
    with pytest.raises(InvalidRequest, match="choose one of them"):
        oneword("export", path, "--only", "<c>", "--output", output)
    oneword("export", path, "--only", "<b>", "--placeholder-token", "<z>", "--output", output)
    assert_holds(only(output), "<z>", VECTORS + 1)


@pytest.mark.parametrize("words", [("show",), ("export", "--output", "x.safetensors")])
def test_options_of_files_do_not_go_with_stored_names(words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="'<x>' is no file"):
        oneword(*words, "<x>", "--text-encoder-2", "y.safetensors")


def test_the_command_shows_every_concept_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oneword("show", save_torch({"<a>": VECTORS, "<b>": VECTORS}, tmp_path / "x.bin"))
    shown = capsys.readouterr().out
    assert "<a>" in shown and "<b>" in shown and shown.count("2 x 24") == 2
    path = save_safe({"<x>": VECTORS}, tmp_path / "one.safetensors")
    path_2 = save_safe({"<x>": VECTORS_2}, tmp_path / "two.safetensors")
    oneword("show", path, "--text-encoder-2", path_2)
    assert "2 x 24 + 40" in capsys.readouterr().out


def test_the_command_imports_every_concept_as_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Concept] = []

    def import_concept(_: Client, content: bytes, **__: object) -> object:
        sent.append(concept_from_bytes(content, source="sent"))
        stored = concepts_pb2.Concept(placeholder_token=sent[-1].placeholder_token)
        return concepts_pb2.ImportConceptResponse(concept=stored, changed=True)

    monkeypatch.setattr(Client, "import_concept", import_concept)
    oneword("import", save_torch({"<a>": VECTORS, "<b>": VECTORS + 1}, tmp_path / "x.bin"))
    assert_holds(sent[0], "<a>", VECTORS)
    assert_holds(sent[1], "<b>", VECTORS + 1)
    assert capsys.readouterr().out.count("stored") == 2


# Which model a concept is for.


def text_spec(dim: int) -> TextSpec:
    return TextSpec(
        max_tokens=77,
        dim=dim,
        output_dim=dim,
        vocab_size=10,
        bos_token_id=8,
        eos_token_id=9,
        pad_token_id=9,
        embedding_fingerprint="a" * 64,
    )


def test_a_concept_of_another_family_is_told_so(tmp_path: Path) -> None:
    sd1 = only(save_torch({"<x>": torch.ones(1, 768)}, tmp_path / "sd1.bin"))
    sdxl = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    xl = only(save_safe(sdxl, tmp_path / "xl.safetensors"))
    one, two = text_spec(768), text_spec(1280)
    check_fits(sd1, one, model_name="m")
    check_fits(xl, one, text_2=two, model_name="m")
    with pytest.raises(
        ConceptMismatch,
        match=r"width 768 \(as Stable Diffusion 1.x\), model 'm' wants 768 \+ 1280 \(as SDXL\)",
    ):
        check_fits(sd1, one, text_2=two, model_name="m")
    with pytest.raises(
        ConceptMismatch, match=r"width 768 \+ 1280 \(as SDXL\), model 'm' wants 768"
    ):
        check_fits(xl, one, model_name="m")
