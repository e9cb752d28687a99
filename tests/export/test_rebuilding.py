"""Building again, and failing: what is kept, what is made anew, what a key covers."""

import ast
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import MANIFEST, Bundle, read_manifest
from tests.export_setup import build, content
from tests.tiny_model import make_tiny_model
from trainer import build_key, compile_plans, export, parity, sampler_tables
from trainer.model import load_model
from trainer.parity import ParityError
from trainer.sources import ROOT, digest_of_sources


def test_a_second_build_touches_nothing(tiny_model: Path, bundle_copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle_copy.rglob("*")}
    again = build(tiny_model, bundle_copy)
    assert not again.was_built and again.seconds == {}
    assert {path: path.stat().st_mtime_ns for path in bundle_copy.rglob("*")} == before


def test_a_damaged_bundle_is_built_again(tiny_model: Path, bundle_copy: Path) -> None:
    expected = content(bundle_copy)
    with (bundle_copy / "vae_decoder.onnx").open("r+b") as file:
        file.write(b"damage")
    assert build(tiny_model, bundle_copy).was_built
    found = content(bundle_copy)
    del expected["parity.json"], expected[MANIFEST]  # holds measured figures, and their hash
    assert expected.items() <= found.items()


def test_other_weights_replace_the_bundle_but_keep_the_sampler_tables(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*_: Any, **__: Any) -> None:
        pytest.fail("the tables of the same scheduler were made again")

    monkeypatch.setattr(export, "build_sampler_tables", must_not_run)
    before = read_manifest(bundle_copy)
    build(make_tiny_model(tmp_path / "other", seed=1), bundle_copy)
    after = Bundle.open(bundle_copy).manifest
    assert after.files["denoiser.onnx"] != before.files["denoiser.onnx"]
    assert after.files["samplers.safetensors"] == before.files["samplers.safetensors"]


def test_a_failed_build_leaves_nothing_behind(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export, "fit_latent_rgb", fail)
    with pytest.raises(OSError, match="disk full"):
        build(tiny_model, tmp_path / "folder" / "within" / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_bundle(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write raises it

    monkeypatch.setattr(export, "fit_latent_rgb", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/bundle'"):
        build(tiny_model, tmp_path / "bundle")


def test_other_code_is_another_build(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return build_key.build_key(load_model(tiny_model), precision="fp32", samplers_key="same")

    before = key()
    assert key() == before
    monkeypatch.setattr(build_key, "digest_of_sources", lambda _: "other code")
    assert key() != before


def test_the_digest_of_sources_is_of_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    before = digest_of_sources(["a.py"], root=tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert digest_of_sources(["a.py"], root=tmp_path) != before


# They say how files are moved and errors are told, not what is in a bundle.
NOT_IN_A_KEY = {"build_job", "errors", "messages", "output_folder", "sampler_pool", "sources"}


def imported_modules(name: str, found: set[str]) -> set[str]:
    """The modules of `trainer` that one of them imports, and those that they import."""
    if name not in found:
        found.add(name)
        source = ROOT / "trainer" / f"{name}.py"
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer."):
                imported_modules((node.module or "").removeprefix("trainer."), found)
    return found


def test_every_module_of_the_exporter_is_in_a_key() -> None:
    keyed = {*build_key.SOURCES, *sampler_tables._SOURCES, *compile_plans.SOURCES}
    modules = {f"trainer/{name}.py" for name in imported_modules("export", set()) - NOT_IN_A_KEY}
    assert modules == {file for file in keyed if file.startswith("trainer/")}


def test_tables_of_another_override_are_made_again(
    tiny_model: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(bundle_copy)
    spec = sampler_tables.SAMPLERS["ddim"]
    changed = spec._replace(overrides={**spec.overrides, "set_alpha_to_one": True})
    monkeypatch.setattr(sampler_tables, "SAMPLERS", {"ddim": changed})
    # The gate draws with diffusers' own DDIM: it would refuse a sampler that is another.
    monkeypatch.setattr(parity, "MIN_PSNR_DB", {"fp32": 0.0})
    assert build(tiny_model, bundle_copy).was_built
    after = read_manifest(bundle_copy)
    assert after.files["samplers.safetensors"] != before.files["samplers.safetensors"]


def test_the_gate_notices_a_schedule_that_is_off_by_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sampler_tables.SAMPLERS["ddim"]
    changed = spec._replace(overrides={"steps_offset": 0})
    monkeypatch.setattr(sampler_tables, "SAMPLERS", {"ddim": changed})
    with pytest.raises(ParityError, match="dB PSNR"):
        build(tiny_model, tmp_path / "bundle")
