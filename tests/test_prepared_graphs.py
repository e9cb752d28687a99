"""Prepared graphs draw what the bundle's own draw, and one that does not fit is never used."""

import dataclasses
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import prepared_graphs, preparing
from engine.bundle import Bundle
from engine.errors import BundleError, StorageFull
from engine.pipeline import Pipeline, sound
from engine.prepared_graphs import GRAPH, NOTE, WEIGHTS, PreparedGraphs, usual_graphs
from engine.preparing import Prepared, prepare_bundle
from engine.requests import GenerationRequest, RgbImage
from engine.sessions import OnnxSession
from oneword.cli import main

GB = 10**9
REQUEST = GenerationRequest(prompt="a red fish", seed=3, num_inference_steps=3)


@pytest.fixture(scope="module")
def bundle(emoji_bundle_path: Path) -> Bundle:
    return Bundle.open(emoji_bundle_path)


@pytest.fixture(scope="module")
def made(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all graphs of the embedded model."""
    folder = tmp_path_factory.mktemp("prepared")
    assert not any(one.was_there for one in prepare(bundle, folder))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in the user's cache, to be spoiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Path(shutil.copytree(made, tmp_path / "oneword" / "prepared"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each graph that is loaded from now on was prepared."""
    seen: list[bool] = []
    init = OnnxSession.__init__

    def watched(self: OnnxSession, path: Path, **options: Any) -> None:
        seen.append(bool(options.get("is_prepared")))
        init(self, path, **options)

    monkeypatch.setattr(OnnxSession, "__init__", watched)
    return seen


def prepare(bundle: Bundle, folder: Path, *, keep_bytes: int = GB) -> list[Prepared]:
    return list(prepare_bundle(bundle, PreparedGraphs(folder), keep_bytes=keep_bytes))


def find(bundle: Bundle, folder: Path, component: str = "denoiser") -> Path | None:
    return PreparedGraphs(folder).find(bundle.sources(component))


def place(bundle: Bundle, folder: Path, component: str = "denoiser") -> Path:
    return PreparedGraphs(folder).place(bundle.sources(component))


def draw(pipeline: Pipeline, request: GenerationRequest = REQUEST) -> RgbImage:
    (image,) = pipeline.begin(pipeline.plan(request))
    while not image.is_done:
        pipeline.step([image])
    return sound(pipeline.decode([image]))[0]


def test_images_are_the_same_to_the_last_bit(
    pipeline: Pipeline, folder: Path, loaded: list[bool]
) -> None:
    """The same kernels on the same weights, which lie packed instead of being packed."""
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    prepared = Pipeline.open(pipeline.bundle.path)
    assert loaded == [True] * 4
    for request in (REQUEST, dataclasses.replace(REQUEST, init_image=photo, strength=0.7)):
        assert np.array_equal(draw(prepared, request), draw(pipeline, request))


def test_what_is_ready_is_not_made_again(bundle: Bundle, folder: Path) -> None:
    assert all(one.was_there for one in prepare(bundle, folder))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no note", "empty note"])
def test_a_damaged_one_is_not_used(
    bundle: Bundle, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = place(bundle, folder)
    weights, note = spoiled / WEIGHTS, spoiled / NOTE
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flipped": lambda: weights.write_bytes(content),
        "truncated": lambda: os.truncate(weights, 1000),
        "missing": weights.unlink,
        "no note": note.unlink,
        "empty note": lambda: note.write_text(""),
    }[damage]()
    assert find(bundle, folder) is None
    assert find(bundle, folder, "vae_decoder") is not None
    assert (damage == "no note") or "is damaged and not used; run `oneword prepare`" in caplog.text
    (mended,) = (one for one in prepare(bundle, folder) if not one.was_there)
    assert mended.component == "denoiser" and find(bundle, folder) is not None


def test_one_that_others_can_write_to_is_not_used(
    bundle: Bundle, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place(bundle, folder) / GRAPH).chmod(0o666)
    assert find(bundle, folder) is None
    assert "can be written to by other users" in caplog.text
    (place(bundle, folder) / GRAPH).chmod(0o644)
    assert find(bundle, folder) is not None
    folder.chmod(0o777)
    assert find(bundle, folder) is None


@pytest.mark.parametrize("change", ["_onnxruntime_version", "_processor", "sums_overflow"])
def test_another_machine_or_library_has_others(
    bundle: Bundle, folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_graphs, change, lambda: "other")
    assert find(bundle, folder) is None


def test_a_processor_is_known_by_what_does_not_change(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    names: list[list[str]] = []
    for mhz, flags in (("2400.1", "avx2"), ("3100.7", "avx2"), ("2400.1", "avx2 avx512f")):
        cpuinfo.write_text(
            f"processor\t: 0\nmodel name\t: X\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\n"
            f"processor\t: 1\nflags\t\t: of another core\n"
        )
        names.append(prepared_graphs._processor(cpuinfo))
    assert names[0] == names[1] != names[2]
    assert not any("other" in name for name in names[0])


def test_other_backends_load_the_bundles_own(
    pipeline: Pipeline, folder: Path, loaded: list[bool]
) -> None:
    pipeline.bundle.open_session("denoiser")
    assert loaded == [False]


def test_a_cache_that_cannot_be_looked_into_is_none(
    pipeline: Pipeline,
    loaded: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As that of another user, which a service may inherit with his HOME."""
    # Too long a name raises an OSError for everybody; a missing permission, not for root.
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + 300 * "x")
    Pipeline.open(pipeline.bundle.path)
    assert loaded == [False] * 4
    assert "prepared graphs are not used" in caplog.text


def test_a_user_without_a_home_has_none(
    pipeline: Pipeline, loaded: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert usual_graphs() is None
    Pipeline.open(pipeline.bundle.path)
    assert loaded == [False] * 4


def test_a_prepared_graph_that_computes_something_else_is_not_kept(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoiled(OnnxSession):
        def __init__(self, path: Path, *, is_prepared: bool = False, **options: Any) -> None:
            if is_prepared:
                weights = path.with_name(WEIGHTS)
                values = np.fromfile(weights, np.float32)
                (-values).tofile(weights)
            super().__init__(path, is_prepared=is_prepared, **options)

    monkeypatch.setattr(preparing, "OnnxSession", Spoiled)
    with pytest.raises(BundleError, match="denoiser computes something else once it is prepared"):
        prepare(bundle, tmp_path / "prepared")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_known_before_anything_is_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageFull, match="denoiser.onnx takes up to .* has 1 MB free; make room"):
        prepare(bundle, tmp_path / "prepared")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_cleared_away(bundle: Bundle, folder: Path) -> None:
    left = folder / f".{'0' * 64}.building-abc"
    left.mkdir()
    (left / WEIGHTS).write_bytes(b"half")
    prepare(bundle, folder)
    assert not left.exists()


def test_what_was_used_least_recently_makes_room(bundle: Bundle, folder: Path) -> None:
    copies = [Path(shutil.copytree(place(bundle, folder), folder / name)) for name in "abc"]
    for age, copy in zip((300, 100, 200), copies, strict=True):
        then = (copy / NOTE).stat().st_mtime - age
        os.utime(copy / NOTE, (then, then))
    (size,) = {sum(file.stat().st_size for file in copy.iterdir()) for copy in copies}
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    prepare(bundle, folder, keep_bytes=total - size)
    assert [copy.exists() for copy in copies] == [False, True, True]
    prepare(bundle, folder, keep_bytes=0)
    assert not any(copy.exists() for copy in copies)
    assert find(bundle, folder) is not None, "what was asked for now stays"


def test_to_be_found_is_to_be_used(bundle: Bundle, folder: Path) -> None:
    note = place(bundle, folder) / NOTE
    os.utime(note, (0, 0))
    find(bundle, folder)
    assert note.stat().st_mtime > 0


def test_the_command_says_what_it_made(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["prepare", str(bundle.path)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert re.search(r"denoiser: [\d.]+ MB, loads in [\d.]+ s \(prepared in [\d.]+ s\)", first)
    assert f"MB in {tmp_path}/oneword/prepared" in first
    assert main(command) == 0
    assert capsys.readouterr().out.count("prepared already") == 4
    assert main([*command, "--keep-gb", "nan"]) == 1
    assert "--keep-gb must be at least 0, got nan" in capsys.readouterr().err


def test_a_damaged_one_is_logged_and_the_image_is_right(
    pipeline: Pipeline, folder: Path, loaded: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(place(pipeline.bundle, folder) / WEIGHTS, 1000)
    with caplog.at_level(logging.WARNING):
        opened = Pipeline.open(pipeline.bundle.path)
    assert sorted(loaded) == [False, True, True, True]
    assert "is damaged and not used" in caplog.text
    assert np.array_equal(draw(opened), draw(pipeline))
