"""Building with one network in memory at a time: the same bundle, and nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.bundle import MANIFEST
from engine.sessions import Array, Feeds
from tests.export_setup import build, content
from trainer import component_memory
from trainer.component_memory import Residence, SessionsInTurn
from trainer.export import BuildReport
from trainer.model import DiffusionModel, load_model


@pytest.fixture
def small_weights_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the tiny model's positions, of 1,920 bytes."""
    monkeypatch.setattr(component_memory, "LARGE_BYTES", 2048)


def on_meta(network: nn.Module) -> int:
    return sum(weight.device.type == "meta" for weight in network.parameters())


def parked_model(folder: Path) -> tuple[DiffusionModel, Residence]:
    residence = Residence(parked_bytes=0)
    return load_model(folder, on_read=residence.add), residence


@pytest.mark.usefixtures("small_weights_are_large")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_built_part_by_part_is_the_same(
    tiny_model: Path, tmp_path: Path, precision: str
) -> None:
    whole = build(tiny_model, tmp_path / "whole", precision=precision)
    parts = build(tiny_model, tmp_path / "parts", precision=precision, parked_bytes=0)
    found, expected = content(parts.path), content(whole.path)
    for name in ("parity.json", MANIFEST):  # figures of another run, and their hash
        del found[name], expected[name]
    assert found == expected
    assert parts.manifest.build_key == whole.manifest.build_key


@pytest.mark.usefixtures("small_weights_are_large")
def test_a_network_has_its_weights_while_somebody_needs_them(tiny_model: Path) -> None:
    expected = load_model(tiny_model)
    model, residence = parked_model(tiny_model)
    assert on_meta(model.unet) and on_meta(model.vae) and on_meta(model.text_encoder)
    with residence.of("denoiser"), residence.of("denoiser", "vae_encoder"):
        with residence.of("unet"):
            pass
        for name in ("unet", "vae"):
            torch.testing.assert_close(
                model.modules[name].state_dict(), expected.modules[name].state_dict()
            )
        assert on_meta(model.text_encoder)
    assert on_meta(model.unet) and on_meta(model.vae)


@pytest.mark.usefixtures("small_weights_are_large")
def test_weights_that_cannot_be_read_again_leave_the_network_parked(tiny_model: Path) -> None:
    model, residence = parked_model(tiny_model)
    network, read = residence._networks["vae"]

    def fail() -> nn.Module:
        raise OSError("the disk is gone")

    residence._networks["vae"] = (network, fail)
    with pytest.raises(OSError, match="the disk is gone"), residence.of("unet", "vae"):
        pass
    assert on_meta(model.unet) and on_meta(model.vae)
    residence._networks["vae"] = (network, read)
    with residence.of("vae"):
        assert not on_meta(model.vae)


def test_small_networks_stay(tiny_model: Path) -> None:
    residence = Residence()
    model = load_model(tiny_model, on_read=residence.add)
    assert not any(on_meta(network) for network in model.modules.values())


def test_one_session_is_open_at_a_time() -> None:
    opened = list[str]()

    class Double:
        def run(self, feeds: Feeds) -> dict[str, Array]:
            return {"y": 2 * feeds["x"]}

    def open_session(name: str) -> Double:
        opened.append(name)
        return Double()

    sessions = SessionsInTurn(("a", "b"), open_session)
    assert opened == [] and set(sessions) == {"a", "b"}
    for name in ("a", "a", "b", "a"):
        np.testing.assert_array_equal(sessions[name].run({"x": np.ones(2)})["y"], [2.0, 2.0])
    assert opened == ["a", "b", "a"]


def test_stages_are_told(report: BuildReport) -> None:
    assert {"export denoiser", "run denoiser in PyTorch", "check denoiser"} <= report.seconds.keys()
