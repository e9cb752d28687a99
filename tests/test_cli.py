"""The command as it is typed: the calls of the README, and what goes wrong in one line."""

import argparse
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from engine.concepts import Concept, concept_to_bytes, read_concept, write_concept
from engine.images import read_parameters
from oneword import concepts as oneword_concepts
from oneword.cli import main
from protos.oneword.v1 import concepts_pb2
from tests.conftest import EMOJI_MODEL, ROOT

TIMEOUT_S = 120.0


def oneword(*words: str | Path, expect: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "oneword", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == expect, f"{words}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def concept_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word learned by the command, in a few steps."""
    path = tmp_path_factory.mktemp("learned") / "x.safetensors"
    oneword(
        *("learn", "examples/concepts/fox", "--placeholder-token", "<x>", "--model", EMOJI_MODEL),
        *("--output", path, "--steps", "3", "--batch-size", "1", "--eval-every", "3"),
    )
    return path


@pytest.fixture(scope="module")
def server(emoji_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server started by the command; it must also stop when told to."""
    words = ["serve", "--bundle", str(emoji_bundle_path), "--listen", "127.0.0.1:0"]
    words += ["--concept-dir", str(tmp_path_factory.mktemp("concepts"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "oneword", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    line = process.stdout.readline()
    assert line.startswith("listening on "), process.communicate()[1]
    yield line.removeprefix("listening on ").strip()
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, log
    assert "Traceback" not in log


def test_learning_writes_a_concept_that_fits_the_model(concept_path: Path) -> None:
    concept = read_concept(concept_path)
    assert concept.placeholder_token == "<x>"
    assert concept.metadata["steps"] == "3"
    assert len(concept.embedding_fingerprint) == 64


def test_generate_sends_the_concept_along(server: str, concept_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    done = oneword(
        *("generate", "a photo of <x>", "--server", server, "--concept", concept_path),
        *("--seed", "7", "--num-inference-steps", "4", "--sampler", "ddim"),
        *("--guidance-scale", "5", "--output", output),
    )
    assert done.stdout.strip() == str(output)
    assert f"concept <x> {read_concept(concept_path).concept_id[:12]}" in done.stderr
    parameters = read_parameters(output.read_bytes())
    assert parameters
    assert (parameters["seed"], parameters["prompt"]) == (7, "a photo of <x>")
    assert parameters["concepts"] == {"<x>": read_concept(concept_path).concept_id}


def test_a_bundle_in_this_process_draws_what_a_server_draws(
    server: str, emoji_bundle_path: Path, concept_path: Path, tmp_path: Path
) -> None:
    words = ["a <x>", "--concept", concept_path, "--seed", "5", "--num-inference-steps", "3"]
    oneword("generate", *words, "--server", server, "--output", tmp_path / "a.png")
    oneword("generate", *words, "--bundle", emoji_bundle_path, "--output", tmp_path / "b.png")
    served, drawn_here = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(served, drawn_here)


def test_several_images_are_numbered(server: str, tmp_path: Path) -> None:
    oneword(
        *("generate", "a dog", "--server", server, "--num-images", "2"),
        *("--num-inference-steps", "2", "--output", tmp_path / "dog.webp"),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dog-0.webp", "dog-1.webp"]


def test_a_random_seed_is_told_and_gives_the_image_again(server: str, tmp_path: Path) -> None:
    words = ["generate", "a cat", "--server", server, "--num-inference-steps", "2", "--output"]
    first = oneword(*words, tmp_path / "a.png")
    match = re.search(r"seed (\d+);", first.stderr)
    assert match
    oneword(*words, tmp_path / "b.png", "--seed", match.group(1))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_life_of_a_stored_concept(server: str, concept_path: Path, tmp_path: Path) -> None:
    at = ("--server", server)
    token = "<stored>"
    stored = oneword("concepts", "import", concept_path, "--placeholder-token", token, *at)
    assert stored.stdout.startswith(f"{token} {read_concept(concept_path).concept_id[:12]} stored")
    assert token in oneword("concepts", "list", *at).stdout
    assert "learning_rate" in oneword("concepts", "show", token, *at).stdout
    oneword("generate", f"a {token}", *at, "--num-inference-steps", "1", "--output",
            tmp_path / "x.png")  # fmt: skip
    oneword("concepts", "export", token, *at, "--output", tmp_path / "back.safetensors")
    assert read_concept(tmp_path / "back.safetensors").placeholder_token == token
    oneword("concepts", "delete", token, *at)
    gone = oneword("concepts", "show", token, *at, expect=1)
    assert gone.stderr.startswith("oneword: ")
    assert token in gone.stderr


def test_export_for_diffusers_needs_no_server(concept_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "learned_embeds.safetensors"
    oneword("concepts", "export", concept_path, "--format", "diffusers", "--output", output)
    (token,) = load_file(output)
    assert token == "<x>"


HOSTILE = {
    "note": "red\x1b[31m",
    "two": "a\nconcept_id  false",
    "concept_id": "false",
    "\x9bk": "v",
}


def test_a_file_cannot_command_the_terminal_or_fake_a_field(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    vectors = np.ones((1, 4), np.float32)
    concept = Concept(placeholder_token="<x>", learned_embeddings=vectors, metadata=HOSTILE)
    write_concept(concept, path)
    shown = oneword("concepts", "show", path).stdout
    assert all(character.isprintable() for character in shown.replace("\n", ""))
    fields = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert fields["concept_id"] == concept.concept_id
    assert fields["metadata.concept_id"] == "false"
    assert fields["metadata.note"] == r"red\x1b[31m"
    assert fields["metadata.two"] == r"a\nconcept_id  false"
    assert fields[r"metadata.\x9bk"] == "v"


def test_a_server_cannot_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = concepts_pb2.Concept(
        placeholder_token="<\x1b[2J>",
        concept_id="\x1b]0;title\x07",
        embedding_fingerprint="f\nf",
        metadata=HOSTILE,
    )
    reply = concepts_pb2.ImportConceptResponse(concept=hostile, changed=True)
    monkeypatch.setattr("engine.client.Client.get", lambda *_: hostile)
    monkeypatch.setattr("engine.client.Client.list", lambda *_: iter([hostile]))
    monkeypatch.setattr("engine.client.Client.import_concept", lambda *_, **__: reply)
    parser = argparse.ArgumentParser()
    oneword_concepts.add_arguments(parser)
    for words in (["show", "<x>"], ["list"]):
        oneword_concepts.run(parser.parse_args(words))
        printed = capsys.readouterr().out
        assert all(character.isprintable() for character in printed.replace("\n", ""))
        assert r"<\x1b[2J>" in printed


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "\U0001f600" * 200, "a\0b"], ids=ascii)
def test_what_cannot_be_a_file_is_a_name(name: str) -> None:
    assert not oneword_concepts.is_concept_file(name)


def test_many_concepts_and_requests_share_one_server(server: str) -> None:
    """1,000 concepts stored, 100 requests with different ones: every one changes the picture."""
    from engine.client import Client

    random = np.random.default_rng(0)
    with Client(server) as client:
        dim = client.server_info().model.embedding_dim
        for index in range(1000):
            vector = random.normal(0, 0.03, (1, dim)).astype(np.float32)
            client.import_concept(
                concept_to_bytes(
                    Concept(placeholder_token=f"<many-{index}>", learned_embeddings=vector)
                )
            )
        pictures = {
            client.generate(prompt=f"a <many-{index}>", seed=1, num_inference_steps=1).images[0]
            for index in range(0, 1000, 10)
        }
        for index in range(1000):
            client.delete(f"<many-{index}>")
    assert len(pictures) == 100


# What goes wrong is one line that says what to do -------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-inference-steps", "0"], "num_inference_steps must be between 1 and 100, got 0"),
        (["--num-inference-steps", "1000000000"], "got 1000000000"),
        (["--num-inference-steps", "-1"], "--num-inference-steps must be between 0 and"),
        (["--width", "7"], "width must be"),
        (["--height", "1000000"], "height must be"),
        (["--guidance-scale", "nan"], "guidance_scale must be between 0 and 100, got nan"),
        (["--seed", str(2**64)], f"--seed must be between 0 and {2**64 - 1}, got {2**64}"),
        (["--sampler", "magic"], "unknown sampler 'magic'; known: ddim"),
        (["--concept", "<nobody>"], "<nobody>"),
        (
            ["--concept", "/no/such.safetensors"],
            "/no/such.safetensors cannot be read",
        ),
        (["--output", "x.gif"], "--output must end in .png or .webp, got 'x.gif'"),
        (["--strength", "0.5"], "strength is for image-to-image"),
        (["--timeout", "0.001"], "no answer within 0.001 s"),
    ],
)
def test_bad_flags_are_refused(server: str, tmp_path: Path, words: list[str], message: str) -> None:
    output = [] if "--output" in words else ["--output", str(tmp_path / "x.png")]
    done = oneword("generate", "a dog", "--server", server, *words, *output, expect=1)
    assert done.stderr.startswith("oneword: ")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_said_before_drawing(
    server: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    for output, message in (("folder.png", "is a folder"), ("none/x.png", "is not a folder to")):
        words = ("--server", server, "--output", tmp_path / output)
        assert message in oneword("generate", "a dog", *words, expect=1).stderr


def test_a_timeout_holds_without_a_server_too(emoji_bundle_path: Path, tmp_path: Path) -> None:
    done = oneword(
        *("generate", "a dog", "--bundle", emoji_bundle_path, "--num-inference-steps", "100"),
        *("--sampler", "heun", "--timeout", "0.05", "--output", tmp_path / "x.png"),
        expect=1,
    )
    assert "the deadline passed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_word_names_itself(server: str, tmp_path: Path) -> None:
    done = oneword("generate", "a <ghost>", "--server", server, "--output", tmp_path / "x.png",
                   expect=1)  # fmt: skip
    assert "<ghost>" in done.stderr


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    done = oneword("generate", "a dog", "--server", "127.0.0.1:1", "--output", tmp_path / "x.png",
                   expect=1)  # fmt: skip
    assert "no server at 127.0.0.1:1; start one with `oneword serve`" in done.stderr


def test_a_concept_of_another_width_is_refused(server: str, tmp_path: Path) -> None:
    path = tmp_path / "sd15.safetensors"
    vectors = np.ones((1, 768), np.float32)
    write_concept(Concept(placeholder_token="<sd>", learned_embeddings=vectors), path)
    done = oneword("concepts", "import", path, "--server", server, expect=1)
    assert "width 768" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--bundle", "/no/bundle"],
        ["generate", "a dog", "--bundle", "/no/bundle"],
        ["concepts", "export", "/no/file.safetensors", "--output", "/tmp/never.safetensors"],
    ],
    ids=["serve", "generate", "export"],
)
def test_what_is_missing_is_named(words: list[str]) -> None:
    done = oneword(*words, expect=1)
    assert "/no/" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not Path("/tmp/never.safetensors").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["/no/images", "--model", str(EMOJI_MODEL)],
        [str(ROOT / "examples" / "concepts" / "fox"), "--model", "/no/model"],
    ],
    ids=["images", "model"],
)
def test_what_learning_lacks_is_named(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In this process, which has PyTorch in memory already."""
    output = tmp_path / "never.safetensors"
    words = ["learn", *words, "--placeholder-token", "<x>", "--output", str(output)]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "/no/" in said and len(said.strip().splitlines()) == 1
    assert not output.exists()


def test_a_corrupted_bundle_is_not_served(emoji_bundle_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(emoji_bundle_path, broken)
    with (broken / "vae_decoder.onnx").open("r+b") as file:
        file.truncate(1000)
    done = oneword("serve", "--bundle", broken, "--listen", "127.0.0.1:0", expect=1)
    assert "vae_decoder.onnx is corrupted" in done.stderr


def test_listening_to_the_world_must_be_said(emoji_bundle_path: Path) -> None:
    done = oneword("serve", "--bundle", emoji_bundle_path, "--listen", "0.0.0.0:0", expect=1)
    assert "insecure" in done.stderr


@pytest.mark.parametrize(
    "command", ["", "learn", "evaluate", "serve", "generate", "concepts", "demo"]
)
def test_help_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: oneword {command}".strip() in capsys.readouterr().out
