"""`oneword doctor`: on any machine it ends, and what it says is true and can be sent."""

import getpass
import json
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import Bundle
from engine.errors import NumericalError, ProviderUnavailable
from oneword import doctor_checks
from oneword.doctor import plan_targets
from oneword.doctor_checks import BROKEN, MISSING, OK, Finding, one_line, without_paths
from oneword.doctor_draw import DrawFailed, draw_apart
from tests.conftest import ROOT

HAS_GPU = shutil.which("nvidia-smi") is not None
no_gpu = pytest.mark.skipif(HAS_GPU, reason="says what is missing without a GPU")


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@no_gpu
def test_on_a_machine_without_a_gpu_it_ends_well_and_says_what_is_true(
    emoji_bundle_path: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "oneword", "doctor", str(emoji_bundle_path), "--output", report],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert (done.returncode, done.stderr) == (0, "")
    fields = json.loads(report.read_text())
    found = {finding["name"]: finding for finding in fields["findings"]}
    states = {name: finding["state"] for name, finding in found.items()}
    assert states["machine"] == states["packages"] == states["bundle"] == "ok"
    assert states["driver"] == states["gpu"] == states["plans"] == "missing"
    assert found["packages"]["facts"]["numpy"] in found["packages"]["says"]
    assert states["backend cpu"] == "ok" and found["backend cpu"]["facts"]["seconds"] > 0
    for backend in ("cuda", "cuda-graphs", "tensorrt", "rtx"):
        finding = found[f"backend {backend}"]
        assert finding["state"] == "missing"
        assert "pip install oneword[" in finding["says"] or "NVIDIA GPU" in finding["says"]
    compiled = {n: f for n, f in found.items() if n.startswith("compiler rtx rtx:")}
    if "tensorrt-rtx-cu13" in found["packages"]["facts"]:
        assert [f["state"] for f in compiled.values()] == ["ok"] * 6, "SM 75 to 121, without a GPU"
    else:
        assert states["compiler rtx"] == "missing" and not compiled
    counts = [list(states.values()).count(state) for state in ("ok", "missing", "broken")]
    assert f"{counts[0]} ok, {counts[1]} missing, {counts[2]} broken" in done.stdout
    for text in (report.read_text(), done.stdout.replace(str(report), "")):
        for secret in (str(ROOT), str(Path.home()), socket.gethostname(), str(tmp_path)):
            assert secret not in text
        assert f"/{getpass.getuser()}" not in text and platform.node() not in text


def test_a_damaged_bundle_is_broken_and_its_place_is_not_told(
    emoji_bundle_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "somebody" / "bundle"
    shutil.copytree(emoji_bundle_path, copy)
    with (copy / "vae_decoder.onnx").open("ab") as file:
        file.write(b"x")
    finding, opened = doctor_checks.bundle(copy)
    assert opened is None and finding.state == BROKEN
    assert "vae_decoder.onnx is corrupted" in finding.says and "somebody" not in finding.says


def test_two_packages_of_onnx_runtime_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_checks.packages().state == OK

    class Installed:
        version = "1.32.0"

    monkeypatch.setattr(
        "importlib.metadata.distributions",
        lambda name: [Installed()] if name.startswith("onnxruntime") else [],
    )
    finding = doctor_checks.packages()
    assert finding.state == BROKEN and "overwrite each other; uninstall both" in finding.says


def test_plans_are_held_against_this_machine(compiled_bundle: Path) -> None:
    opened = Bundle.open(compiled_bundle)
    (finding,) = doctor_checks.plans(opened, None)
    assert finding.name == "plans rtx:sm86,sm89" and finding.state == MISSING
    assert finding.says.startswith("all 7 plans are sound, for 24x24, ")
    gpu = doctor_checks.Gpu(
        name="GPU", capability="sm89", memory_bytes=1 << 30, driver_version=13000
    )
    (finding,) = doctor_checks.plans(opened, gpu)
    assert finding.state == OK


@pytest.mark.parametrize(
    ("capability", "targets"), [("sm89", ["rtx:sm89"]), ("sm90", []), (None, [])]
)
def test_the_embedded_model_is_compiled_for_the_gpu_that_is_here(
    capability: str | None, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here with TensorRT for RTX, which has nothing for Hopper, and without TensorRT."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    gpu = capability and doctor_checks.Gpu(
        name="GPU", capability=capability, memory_bytes=1 << 30, driver_version=13000
    )
    assert plan_targets(gpu or None) == targets


@pytest.mark.parametrize(
    ("capability", "says"),
    [("sm90", "this GPU is sm90; use --backend tensorrt or cuda"), ("sm120", "this GPU is sm120")],
)
def test_plans_for_another_gpu_are_missing_here(
    compiled_bundle: Path, capability: str, says: str
) -> None:
    gpu = doctor_checks.Gpu(
        name="GPU", capability=capability, memory_bytes=1 << 30, driver_version=13000
    )
    (finding,) = doctor_checks.plans(Bundle.open(compiled_bundle), gpu)
    assert finding.state == MISSING and finding.says.endswith(says)


def test_whatever_a_backend_does_the_others_have_their_turn(tmp_path: Path) -> None:
    def draw(_path: Path, backend: str) -> float:
        if backend == "cuda":
            raise DrawFailed("its process ended by SIGSEGV: it said nothing")
        if backend == "rtx":
            raise NumericalError("the model produced NaN")
        if backend == "tensorrt":
            raise ProviderUnavailable("TensorRT is not installed")
        return 1.0

    found = by_name(list(doctor_checks.backends(tmp_path, draw)))
    states = {name.removeprefix("backend "): f.state for name, f in found.items()}
    assert states == {
        "cpu": OK,
        "openvino": OK,
        "openvino-bf16": OK,
        "cuda": BROKEN,
        "cuda-graphs": OK,
        "tensorrt": MISSING,
        "rtx": BROKEN,
    }
    assert "SIGSEGV" in found["backend cuda"].says and found["backend cuda"].remedy


def test_an_error_keeps_its_kind_on_its_way_from_the_process(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no bundle at") as caught:
        draw_apart(tmp_path, "cpu")
    assert type(caught.value).__name__ == "BundleError"


def test_a_process_that_dies_is_told_with_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess([], -11, stdout="", stderr="what it said last\n")

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(DrawFailed, match="ended by SIGSEGV: what it said last"):
        draw_apart(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot load /home/ada/.venv/lib/libcuda.so.1: no", "cannot load libcuda.so.1: no"),
        ("see https://example.org/a/b for more", "see https://example.org/a/b for more"),
        ("rtx:sm86 and 256x256-768x768, 1/2", "rtx:sm86 and 256x256-768x768, 1/2"),
    ],
)
def test_folders_are_left_out_of_messages(text: str, left: str) -> None:
    assert without_paths(text) == left
    assert one_line(f"{text}\n  again") == f"{left} again"
