"""A packed bundle draws what the bundle draws, with nothing but itself; half of one is none."""

import contextlib
import dataclasses
import hashlib
import io
import json
import resource
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

from engine.batching.batcher import Batcher, generate
from engine.bundle import MANIFEST, TOKEN_EMBEDDING, Bundle, read_manifest
from engine.client import Client
from engine.concepts import Concept, write_concept
from engine.errors import BundleError, ConceptMismatch, InvalidRequest, UnknownConcept
from engine.files import sha256_of_file
from engine.fingerprint import embedding_fingerprint
from engine.packed import read_packed_concepts
from engine.pipeline import Pipeline
from engine.plans.manifest import FORMAT_VERSION as PLAN_VERSION
from engine.plans.manifest import PLAN_MANIFEST, PlanManifest, PlanSpec
from engine.requests import GenerationRequest
from engine.security.bundle_signatures import check_bundle
from engine.security.signing import create_keys
from oneword.cli import main
from oneword.packing import PackReport, pack_bundle, to_float16
from tests.isolated import isolated_command, isolated_environment

PROMPT, SEED, STEPS = "a photo of <x>", 7, 4
# A prompt's vectors off by float16's rounding, 5e-4 of each value: below what 8 bits can show for
# most pixels. A word left out gives some 10 dB, timesteps off by one of a thousand 50 dB.
MIN_PSNR_DB = 50.0
# Python 3.11 before 3.11.4 has no filters, Python 3.14 has this one by default.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


@pytest.fixture(scope="module")
def word(emoji_bundle_path: Path) -> Concept:
    text = read_manifest(emoji_bundle_path).text
    return make_word("<x>", text.dim, fingerprint=text.embedding_fingerprint)


def make_word(token: str, dim: int, *, fingerprint: str = "", seed: int = 0) -> Concept:
    vectors = np.random.default_rng(seed).normal(size=(2, dim)).astype(np.float32)
    vectors *= 0.23 / np.linalg.norm(vectors, axis=1, keepdims=True)  # as long as the vocabulary's
    return Concept(
        placeholder_token=token, learned_embeddings=vectors, embedding_fingerprint=fingerprint
    )


def pack(source: Path, output: Path, concepts: Sequence[Concept] = (), **options: object) -> Path:
    report: PackReport = pack_bundle(
        source,
        output,
        requirements=lambda plans: f"numpy==2.0.0  # plans: {plans}\n",
        concepts=concepts,
        **options,  # pyright: ignore[reportArgumentType]
    )
    return report.path


@pytest.fixture(scope="module")
def packed(
    emoji_bundle_path: Path, word: Concept, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return pack(emoji_bundle_path, tmp_path_factory.mktemp("packed") / "device", [word])


def draw(bundle: Path, concepts: tuple[Concept, ...]) -> np.ndarray:
    pipeline = Pipeline.open(bundle)
    with contextlib.closing(Batcher(pipeline)) as batcher:
        request = GenerationRequest(
            prompt=PROMPT, concepts=concepts, seed=SEED, num_inference_steps=STEPS
        )
        images, _ = generate(batcher, pipeline.plan(request))
    return images[0].image


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    error = np.mean((image / 255.0 - reference / 255.0) ** 2)
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def test_a_packed_bundle_draws_by_name_without_torch_and_network(
    emoji_bundle_path: Path, word: Concept, tmp_path: Path
) -> None:
    key, output = tmp_path / "key", tmp_path / "device"
    create_keys(key)
    write_concept(word, tmp_path / "x.safetensors")
    arguments = ["--concept", str(tmp_path / "x.safetensors"), "--sign-key", str(key)]
    assert main(["pack", str(emoji_bundle_path), "--output", str(output), *arguments]) == 0
    check_bundle(output, [tmp_path / "key.pub"])
    shutil.move(tmp_path / "device", tmp_path / "elsewhere")
    picture = tmp_path / "x.png"
    words = ("-m", "oneword", "generate", PROMPT, "--bundle", tmp_path / "elsewhere")
    rest = ("--seed", SEED, "--num-inference-steps", STEPS, "--output", picture)
    subprocess.run(
        isolated_command(*words, *rest),
        env=isolated_environment(tmp_path),
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    # The embedded model is stored in float16, so that its table loses nothing.
    found = np.asarray(Image.open(picture))
    np.testing.assert_array_equal(found, draw(emoji_bundle_path, (word,)))


def test_the_test_really_takes_torch_away(tmp_path: Path) -> None:
    for code in ("import torch", "import socket; socket.create_connection(('192.0.2.1', 9), 1)"):
        done = subprocess.run(
            isolated_command("-c", code),
            env=isolated_environment(tmp_path),
            check=False,
            capture_output=True,
        )
        assert done.returncode == 1
        assert b"blocked by the test" in done.stderr or b"OSError" in done.stderr


@contextlib.contextmanager
def served(bundle: Path, folder: Path) -> Generator[str]:
    address = f"unix:{folder / 'socket'}"
    with subprocess.Popen(
        isolated_command("-m", "oneword", "serve", "--bundle", bundle, "--listen", address),
        env=isolated_environment(folder),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == f"listening on {address}\n"
            yield address
        finally:
            process.terminate()
            process.wait(30)


def test_a_packed_bundle_is_served_without_torch_and_network(
    packed: Path, emoji_bundle_path: Path, word: Concept, tmp_path: Path
) -> None:
    with served(packed, tmp_path) as address, Client(address) as client:
        result = client.generate(prompt=PROMPT, seed=SEED, num_inference_steps=STEPS)
    assert [c.placeholder_token for c in result.summary.matched_concepts] == ["<x>"]
    found = np.asarray(Image.open(io.BytesIO(result.images[0])))
    np.testing.assert_array_equal(found, draw(emoji_bundle_path, (word,)))


@pytest.fixture(scope="module")
def float32_bundle(emoji_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a table that float16 cannot hold: noise below its last digit."""
    path = tmp_path_factory.mktemp("float32") / "bundle"
    path.mkdir()
    for file in emoji_bundle_path.iterdir():
        (path / file.name).symlink_to(file)
    (path / TOKEN_EMBEDDING).unlink()
    table = load_file(emoji_bundle_path / TOKEN_EMBEDDING)["token_embedding"]
    noise = np.random.default_rng(3).uniform(-(2**-11), 2**-11, table.shape)
    table = (table * (1 + noise)).astype(np.float32)
    (path / TOKEN_EMBEDDING).write_bytes(save({"token_embedding": table}))
    manifest = read_manifest(emoji_bundle_path)
    files = {**manifest.files, TOKEN_EMBEDDING: sha256_of_file(path / TOKEN_EMBEDDING)}
    text = dataclasses.replace(manifest.text, embedding_fingerprint=embedding_fingerprint(table))
    (path / MANIFEST).unlink()
    changed = dataclasses.replace(manifest, files=files, text=text)
    (path / MANIFEST).write_text(changed.to_json())
    return path


def test_rounding_the_table_hardly_shows(float32_bundle: Path, tmp_path: Path) -> None:
    text = read_manifest(float32_bundle).text
    word = make_word("<x>", text.dim, fingerprint=text.embedding_fingerprint)
    small = pack(float32_bundle, tmp_path / "device", [word])
    table = Bundle.open(small).token_embedding
    assert table.dtype == np.float16
    assert not np.array_equal(table, Bundle.open(float32_bundle).token_embedding)
    assert psnr_db(draw(small, (word,)), draw(float32_bundle, (word,))) > MIN_PSNR_DB


def test_words_of_the_float32_table_fit_the_packed_one_and_others_do_not(
    float32_bundle: Path, tmp_path: Path
) -> None:
    before = read_manifest(float32_bundle).text
    small = pack(float32_bundle, tmp_path / "device")
    after = read_manifest(small).text
    assert after.embedding_fingerprint == before.embedding_fingerprint
    pipeline = Pipeline.open(small)
    fits = make_word("<x>", before.dim, fingerprint=before.embedding_fingerprint)
    pipeline.plan(GenerationRequest(prompt=PROMPT, concepts=(fits,)))
    rounded = embedding_fingerprint(Bundle.open(small).token_embedding)
    assert rounded != before.embedding_fingerprint
    other = make_word("<x>", before.dim, fingerprint=rounded)
    with pytest.raises(ConceptMismatch, match="was learned on a text encoder with fingerprint"):
        pipeline.plan(GenerationRequest(prompt=PROMPT, concepts=(other,)))


def test_rows_of_a_float16_table_are_widened_and_vectors_laid_in_as_they_are(
    packed: Path, word: Concept
) -> None:
    pipeline = Pipeline.open(packed)
    read = pipeline.reader.read("a <x>", [word])
    table = pipeline.bundle.token_embedding
    assert read.inputs_embeds.dtype == np.float32
    expected = table[read.input_ids].astype(np.float32)
    ((row, at, _),) = read.slots
    expected[row, at : at + 2] = word.learned_embeddings
    np.testing.assert_array_equal(read.inputs_embeds, expected)


def test_a_table_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(BundleError, match="up to 70000, float16 holds 65504"):
        to_float16(np.array([[1.0, 7e4]], np.float32), TOKEN_EMBEDDING)


def test_the_packed_words_are_found_by_name_and_a_stored_one_goes_before(
    packed: Path, word: Concept, tmp_path: Path
) -> None:
    from engine.serving.wire import request_from_proto
    from engine.store.concept_store import ConceptStore
    from protos.oneword.v1.generation_pb2 import ConceptReference, GenerateRequest

    pipeline = Pipeline.open(packed)
    store = ConceptStore(tmp_path / "store")

    def find(*references: ConceptReference, prompt: str = "") -> list[str]:
        message = GenerateRequest(prompt=prompt, concepts=references)
        request = request_from_proto(
            message,
            store=store,
            limits=pipeline.limits,
            tenant="anybody",
            packed_concepts=pipeline.packed_concepts,
        )
        return [concept.concept_id for concept in request.concepts]

    assert find(prompt="a <x>") == [word.concept_id]
    assert find(ConceptReference(placeholder_token="<x>")) == [word.concept_id]
    assert find(ConceptReference(concept_id=word.concept_id)) == [word.concept_id]
    with pytest.raises(UnknownConcept, match="'<y>'; stored: none.*packed with the model: <x>"):
        find(prompt="a <y>")
    own = make_word("<x>", word.dim, seed=1)
    store.import_concept(own, tenant="anybody")
    assert find(prompt="a <x>") == [own.concept_id]
    store.close()


def test_the_name_of_a_word_is_never_a_path(
    emoji_bundle_path: Path, word: Concept, tmp_path: Path
) -> None:
    bad = dataclasses.replace(word, placeholder_token="<../../../evil>")
    absolute = dataclasses.replace(word, placeholder_token="/tmp/evil")
    path = pack(emoji_bundle_path, tmp_path / "out" / "device", [bad, absolute])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["device"]
    assert {file.suffix for file in (path / "concepts").iterdir()} == {".safetensors"}
    assert set(read_packed_concepts(Bundle.open(path))) == {"<../../../evil>", "/tmp/evil"}


def test_a_word_given_twice_is_packed_once_and_two_of_a_name_are_refused(
    emoji_bundle_path: Path, word: Concept, tmp_path: Path
) -> None:
    path = pack(emoji_bundle_path, tmp_path / "once", [word, word])
    assert len(list((path / "concepts").iterdir())) == 1
    other = make_word("<x>", word.dim, seed=1)
    with pytest.raises(InvalidRequest, match="two different concepts are called '<x>'"):
        pack(emoji_bundle_path, tmp_path / "twice", [word, other])
    with pytest.raises(InvalidRequest, match="two different concepts are called '<x>'"):
        pack(path, tmp_path / "again", [other])
    wide = make_word("<wide>", word.dim + 1)
    with pytest.raises(ConceptMismatch, match="vectors of width"):
        pack(emoji_bundle_path, tmp_path / "wide", [wide])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["once"]


def test_what_was_packed_can_be_packed_again_with_its_words(
    packed: Path, word: Concept, tmp_path: Path
) -> None:
    other = make_word("<y>", word.dim, seed=1)
    again = Bundle.open(pack(packed, tmp_path / "again", [other]))
    assert set(read_packed_concepts(again)) == {"<x>", "<y>"}
    np.testing.assert_array_equal(again.token_embedding, Bundle.open(packed).token_embedding)


def test_what_is_there_is_left_alone(emoji_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.tar").write_text("mine")
    for name in ("folder", "file.tar"):
        with pytest.raises(BundleError, match="is there already; remove it"):
            pack(emoji_bundle_path, tmp_path / name)
    assert (tmp_path / "file.tar").read_text() == "mine"
    with pytest.raises(BundleError, match="lies in the bundle that is packed"):
        pack(emoji_bundle_path, emoji_bundle_path / "packed")


@pytest.mark.parametrize("name", ["device", "device.tar"])
def test_a_full_disk_leaves_nothing_and_names_the_output(
    emoji_bundle_path: Path, tmp_path: Path, name: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for every file of the bundle, the largest has 36 MB, and not for an archive of them.
    room = 1_000_000 if name == "device" else 40_000_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=rf"too large: '.*/{name}'"):
            pack(emoji_bundle_path, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def archives(
    emoji_bundle_path: Path, word: Concept, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("archives")
    return {
        name: pack(emoji_bundle_path, folder / f"device.{name}", [word]) for name in ("tar", "zip")
    }


@pytest.mark.parametrize("name", ["tar", "zip"])
def test_an_archive_holds_the_packed_folder_and_is_the_same_every_time(
    emoji_bundle_path: Path,
    word: Concept,
    packed: Path,
    archives: dict[str, Path],
    tmp_path: Path,
    name: str,
) -> None:
    again = pack(emoji_bundle_path, tmp_path / f"device.{name}", [word])
    assert sha256_of_file(archives[name]) == sha256_of_file(again)
    assert list(tmp_path.iterdir()) == [again]
    unpack(again, tmp_path / "out")
    found = Bundle.open(tmp_path / "out" / "device")
    assert found.manifest == read_manifest(packed)
    with pytest.raises(BundleError, match="is a file, a bundle is a folder; unpack"):
        Bundle.open(again)


def unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".tar":
        with tarfile.open(archive) as packed:
            packed.extractall(folder, **SAFELY)
    else:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.999])
def test_what_comes_out_of_half_an_archive_is_no_bundle(
    archives: dict[str, Path], tmp_path: Path, share: float
) -> None:
    content = archives["tar"].read_bytes()
    content = content[: int(len(content.rstrip(b"\0")) * share)]
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(content)) as half:
        half.extractall(tmp_path / "out", **SAFELY)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "out" / "device")
    content = archives["zip"].read_bytes()
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(content[: int(len(content) * share)]))


def test_a_packed_word_that_was_changed_is_refused(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "device"
    shutil.copytree(packed, path)
    (file,) = (path / "concepts").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="is corrupted: SHA-256"):
        Bundle.open(path)


def test_a_manifest_may_not_list_a_word_that_is_none(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "device"
    shutil.copytree(packed, path)
    (path / "concepts" / "note.txt").write_text("not a concept")
    manifest = read_manifest(path)
    manifest.files["concepts/note.txt"] = sha256_of_file(path / "concepts" / "note.txt")
    (path / MANIFEST).write_text(manifest.to_json())
    with pytest.raises(BundleError, match="note.txt.*pack the bundle again"):
        read_packed_concepts(Bundle.open(path))


def test_the_plans_asked_for_are_packed_and_signed(emoji_bundle_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(emoji_bundle_path, source)
    for capability in ("sm86", "sm89"):
        _write_plan(source / "plans" / f"rtx-{capability}", capability)
    create_keys(tmp_path / "key")
    arguments = ["--plans", "rtx-sm89", "--sign-key", str(tmp_path / "key")]
    assert main(["pack", str(source), "--output", str(tmp_path / "one"), *arguments]) == 0
    check_bundle(tmp_path / "one", [tmp_path / "key.pub"])
    assert [path.name for path in (tmp_path / "one" / "plans").iterdir()] == ["rtx-sm89"]
    assert not (pack(source, tmp_path / "none", plans=[]) / "plans").exists()
    assert len(list((pack(source, tmp_path / "all") / "plans").iterdir())) == 2
    with pytest.raises(BundleError, match="no plans 'rtx-sm120'; there: rtx-sm86, rtx-sm89"):
        pack(source, tmp_path / "unknown", plans=["rtx-sm120"])
    (source / "plans" / "rtx-sm86" / "denoiser.plan").write_bytes(b"vtrt another")
    with pytest.raises(BundleError, match="denoiser.plan is corrupted"):
        pack(source, tmp_path / "spoiled")
    assert not (tmp_path / "spoiled").exists()


def _write_plan(folder: Path, capability: str) -> None:
    folder.mkdir(parents=True)
    (folder / "denoiser.plan").write_bytes(b"vtrt a plan" * 100)
    spec = PlanSpec(
        file="denoiser.plan",
        sha256=hashlib.sha256(b"vtrt a plan" * 100).hexdigest(),
        key="key",
        sources={},
        precision="fp16",
        inputs=[],
        outputs=[],
        profiles=[],
    )
    manifest = PlanManifest(
        format_version=PLAN_VERSION,
        target=f"rtx:{capability}",
        library="tensorrt_rtx",
        library_version="1.4",
        buckets=["64"],
        bundle_build_key=read_manifest(folder.parent.parent).build_key,
        plan_key="key",
        components={"denoiser": spec},
    )
    (folder / PLAN_MANIFEST).write_text(manifest.to_json())


def test_only_a_bundle_of_a_trusted_key_is_packed(emoji_bundle_path: Path, tmp_path: Path) -> None:
    create_keys(tmp_path / "key")
    with pytest.raises(BundleError, match="is not signed"):
        pack(emoji_bundle_path, tmp_path / "device", trusted_keys=[tmp_path / "key.pub"])


def test_the_requirements_name_exact_versions_and_no_torch(packed: Path) -> None:
    import importlib.metadata

    from oneword.pack_requirements import runtime_requirements

    lines = runtime_requirements(signed=True, plans=["rtx-sm86", "rtx-sm89"]).splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins.pop("tensorrt-rtx-cu13", None)  # a comment says so where it is not installed
    assert any("tensorrt-rtx-cu13" in line for line in lines)
    assert {"numpy", "grpcio", "onnxruntime", "tokenizers", "cryptography"} <= pins.keys()
    assert not {"torch", "diffusers", "transformers", "oneword", "pytest"} & pins.keys()
    assert "onnx==" not in runtime_requirements(signed=True, plans=[])
    assert all(importlib.metadata.version(name) == version for name, version in pins.items())
    assert json.loads((packed / MANIFEST).read_text())["files"]["requirements.txt"]
