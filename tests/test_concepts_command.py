"""`oneword concepts` on files of other tools."""

import argparse
from pathlib import Path

import pytest

from engine.client import Client
from engine.concepts import Concept, concept_from_bytes
from engine.dialects.writers import NAMED_BY_FILE, Dialect
from engine.errors import InvalidRequest
from oneword import concepts as oneword_concepts
from protos.oneword.v1 import concepts_pb2
from tests.dialect_files import VECTORS, VECTORS_2, a1111, assert_holds, only, save_safe, save_torch


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


def test_an_etag_is_that_of_one_name(tmp_path: Path) -> None:
    path = save_torch({"<a>": VECTORS, "<b>": VECTORS + 1}, tmp_path / "x.bin")
    with pytest.raises(InvalidRequest, match="--etag is that of one name, .* holds 2 concepts"):
        oneword("import", path, "--etag", "e")
