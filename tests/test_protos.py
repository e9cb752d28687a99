"""The API's files: committed stubs are up to date, lint is clean, defaults are what is written."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.requests import GenerationRequest, Limits
from protos.oneword.v1 import generation_pb2

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "protos" / "oneword" / "v1"


def test_committed_stubs_are_what_the_protos_generate() -> None:
    pytest.importorskip("grpc_tools")
    from protos.generate import differences

    assert differences() == []


def test_a_stale_stub_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc_tools")
    from protos import generate

    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    folder = tmp_path / "protos" / "oneword" / "v1"
    (folder / "concepts_pb2.py").write_text("# edited by hand\n")
    (folder / "gone_pb2.py").write_text("")
    (folder / "server_info_pb2_grpc.py").unlink()
    assert generate.differences() == [
        "protos/oneword/v1/gone_pb2.py has no .proto",
        "protos/oneword/v1/concepts_pb2.py is missing or out of date",
        "protos/oneword/v1/server_info_pb2_grpc.py is missing or out of date",
    ]


def test_buf_lint_is_clean() -> None:
    buf = Path(sys.executable).parent / "buf"
    if not buf.exists():
        pytest.skip("buf-bin is not installed")
    result = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def buf_breaking(root: Path) -> subprocess.CompletedProcess[str]:
    """As `make check` runs it, of the protos under `root`; needs no history and no network."""
    buf = Path(sys.executable).parent / "buf"
    if not buf.exists():
        pytest.skip("buf-bin is not installed")
    against = ("--against", ROOT / "protos" / "released.binpb")
    return subprocess.run(
        [buf, "breaking", "protos", *against], cwd=root, capture_output=True, text=True, timeout=60
    )


def test_the_api_breaks_nothing_that_was_released() -> None:
    result = buf_breaking(ROOT)
    assert (result.returncode, result.stdout) == (0, "")
    makefile = (ROOT / "Makefile").read_text()
    assert "buf breaking protos --against protos/released.binpb" in makefile


# A line of concepts.proto, what somebody might make of it, and what buf says to that.
BREAKS = (
    ("  string concept_id = 2;\n", "", 'field "2" with name "concept_id" on message "Concept"'),
    ("  uint32 dim = 4;\n", "  uint32 width = 4;\n", 'from "dim" to "width"'),
    ("  bytes content = 1;\n", "  string content = 1;\n", 'from "bytes" to "string"'),
    ("  CONCEPT_FORMAT_ONEWORD = 1;\n", "  CONCEPT_FORMAT_ONEWORD = 3;\n", 'enum value "1"'),
    ("  rpc ListConcepts(", "  rpc ListAll(", 'RPC "ListConcepts" on service'),
)


def test_a_change_that_would_break_a_client_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    path = tmp_path / "protos" / "oneword" / "v1" / "concepts.proto"
    text = path.read_text()
    for line, instead, _ in BREAKS:
        assert line in text
        text = text.replace(line, instead, 1)
    path.write_text(text)
    result = buf_breaking(tmp_path)
    assert result.returncode == 100
    for *_, complaint in BREAKS:
        assert complaint in result.stdout


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.proto")), ids=lambda path: path.name)
def test_every_field_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    fields = [index for index, line in enumerate(lines) if re.search(r" = \d+;$", line)]
    assert fields
    assert [lines[index] for index in fields if "//" not in lines[index - 1]] == []


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.proto")), ids=lambda path: path.name)
def test_no_file_imports_another_one_of_the_api(path: Path) -> None:
    """What lets protoc (from the repository) and buf (from protos/) agree on paths."""
    imports = re.findall(r'^import "(.*)";', path.read_text(), re.MULTILINE)
    assert [name for name in imports if not name.startswith("google/protobuf/")] == []


def test_documented_defaults_are_those_of_the_runtime() -> None:
    comments = _field_comments("GenerateRequest")
    defaults = {field.name: field.default for field in dataclasses.fields(GenerationRequest)}
    assert f'default "{defaults["sampler"]}"' in comments["sampler"]
    for name in ("num_images", "num_inference_steps", "guidance_scale", "strength"):
        assert f"default {defaults[name]}" in comments[name], name
    limits = Limits()
    assert f"1 to {limits.max_images_per_request};" in comments["num_images"]
    assert f"at most {limits.max_concepts_per_request};" in comments["concepts"]


def _field_comments(message: str) -> dict[str, str]:
    text = (PACKAGE / "generation.proto").read_text()
    body = text.split(f"message {message} {{", 1)[1].split("\n}", 1)[0]
    found = re.findall(r"((?:  //.*\n)+)  [^/\n]* (\w+) = \d+;", body)
    comments = {name: " ".join(comment.replace("//", "").split()) for comment, name in found}
    assert set(comments) == set(generation_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    return comments
