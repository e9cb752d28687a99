"""The benchmark of one image: what is compared, when nothing is, and what the page says."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.inference import environments
from benchmarks.inference.cases import CASES, Prepared, prepare, renew_manifest
from benchmarks.inference.environments import MissingSystem, python_of, versions_of
from benchmarks.inference.figure import draw_figure
from benchmarks.inference.measure import DifferentWork, measure_beside_ours
from benchmarks.inference.page import QUALITY, page
from benchmarks.inference.processes import WorkerFailed, running_worker
from benchmarks.inference.systems import SYSTEMS
from engine.bundle import Bundle
from engine.errors import BundleError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, emoji_bundle_path: Path) -> Prepared:
    """The embedded case over the tests' own bundle, with very few rounds."""
    import dataclasses
    import shutil

    made = prepare(CASES["embedded"], tmp_path_factory.mktemp("cache"))
    shutil.copytree(emoji_bundle_path, made.shared / "bundle-fp32")
    case = dataclasses.replace(made.case, steps=2, call_rounds=2, image_rounds=2)
    return dataclasses.replace(made, case=case)


def _system(name: str) -> Any:
    return next(spec for spec in SYSTEMS if spec.name == name)


def test_diffusers_does_the_same_work(prepared: Prepared) -> None:
    result = measure_beside_ours(_system("diffusers eager"), prepared, prepared.shared)
    # Sums in another order, and 8 bits: rounding alone leaves 58.9 dB.
    assert result["call_error"] < 1e-5 and result["psnr_db"] > 55
    assert set(result["versions"]) == {"torch", "diffusers", "transformers"}
    for kind in ("call", "image"):
        assert result[kind]["rounds"] == 2 and result[kind]["ratio"] > 0
    assert min(result["peak_gflops"]) > 0


@pytest.mark.slow
def test_a_float32_system_that_does_something_else_is_not_compared(prepared: Prepared) -> None:
    import dataclasses

    spec = dataclasses.replace(_system("diffusers bfloat16"), is_exact=True)
    with pytest.raises(DifferentWork, match=r"a call is off by .* not the same work"):
        measure_beside_ours(spec, prepared, prepared.shared)


def test_operations_of_a_call_are_counted(prepared: Prepared) -> None:
    """Against PyTorch's own count while computing, of the same call.

    With attention written out: the fused one for CPUs is not counted.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from trainer.model import load_model

    feeds = dict(np.load(prepared.folder / "feeds.npz"))
    unet: Any = load_model(prepared.model).unet
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        unet(*(torch.from_numpy(feeds[n]) for n in ("latents", "timestep", "prompt_embeds")))
    assert prepared.call_gflop() == pytest.approx(counter.get_total_flops() / 1e9)


def test_a_replaced_file_gets_its_hash(prepared: Prepared, tmp_path: Path) -> None:
    import shutil

    bundle = Path(shutil.copytree(prepared.bundle("fp32"), tmp_path / "bundle"))
    parity = bundle / "parity.json"
    parity.write_text(parity.read_text() + "\n")
    with pytest.raises(BundleError, match=r"parity\.json is corrupted"):
        Bundle.open(bundle)
    renew_manifest(bundle)
    Bundle.open(bundle)


@pytest.mark.slow
def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    settings = {"feeds": str(tmp_path / "missing.npz"), "model": str(tmp_path), "exported": ""}
    settings["kind"] = "eager"
    with (
        pytest.raises(WorkerFailed, match=r"model_index\.json"),
        running_worker("eager", Path(sys.executable), "diffusers_pipeline.py", tmp_path, settings),
    ):
        pass


def test_a_system_that_cannot_be_had_is_missing_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(command: list[str]) -> None:
        raise MissingSystem(f"no network for {command[-1]}")

    monkeypatch.setattr(environments, "_run", refused)
    with pytest.raises(MissingSystem, match="no network"):
        python_of("optimum-onnx", tmp_path)
    assert python_of(None, tmp_path) == Path(sys.executable)
    assert set(versions_of(Path(sys.executable), ("numpy", "no-such-package"))) == {"numpy"}


def _entry(result: dict[str, Any]) -> dict[str, Any]:
    machine = {"date": "2026-11-23", "processor": "a processor", "cores": 2, "memory_gb": 24}
    return {"commit": "c", "date": "d", "seconds": 1.0, "machine": machine, "result": result}


def _measured(ratio: float, precision: str = "float32") -> dict[str, Any]:
    times = {"ours_ms": 100.0, "ms": 100.0 * ratio, "ratio": ratio, "rounds": 3}
    return {
        "precision": precision,
        "versions": {"numpy": "2.4"},
        "call_error": 1e-6,
        "psnr_db": 58.9,
        "call": {**times, "ratio_quartiles": [ratio, ratio]},
        "image": {**times, "ratio_quartiles": [ratio, ratio]},
        "peak_gflops": [200.0, 300.0],
        "gflop": 15.0,
    }


def test_the_page_has_every_system_and_what_is_missing() -> None:
    quality = {
        "prompts": 80,
        "psnr_db": {"median": 38.0, "tenth": 31.0, "lowest": 25.0},
        "likeness": 0.99,
        "marks": {kind: {"object": "90 % of 80"} for kind in ("fp32", "int8")},
    }
    results = {
        "embedded/OneWord int8": _entry(_measured(0.5, "int8 denoiser")),
        "embedded/diffusers eager": _entry(_measured(2.0)),
        "embedded/OneWord openvino": _entry({"missing": "pip says no", "gflop": 15.0}),
        QUALITY: _entry(quality),
    }
    text = page(json.loads(json.dumps(results)), "figure.png")
    # 15 GFLOP in 100 ms of the best 300 GFLOP/s, and 2 / 0.5 against eager.
    assert "| **OneWord** | float32 | 100 | | 1 | 50 % | 100 | | 1 | 2.00x | |" in text
    assert "| OneWord int8 | int8 denoiser | 50.0 | 100 | 0.50 | 100 % " in text
    assert "| 4.00x | 58.9 dB |" in text
    assert "- OneWord openvino: not measured: pip says no" in text
    assert "median 38.0 dB" in text and "| object | 90 % of 80 | 90 % of 80 |" in text
    assert draw_figure(results).width == 900


def test_a_page_of_nothing_says_so() -> None:
    assert "Nothing was measured yet" in page({}, "figure.png")
