"""The folder of a bundle: whole or as it was, whenever a build ends."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engine.staging import remove_abandoned, staged_folder
from tests.export_setup import build, content
from tests.tiny_model import make_tiny_model
from trainer import component_build, export
from trainer.onnx_graphs import ExportError, Graph, export_graph
from trainer.parity import ParityError


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder with a file, to be replaced."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


def replace(output: Path) -> None:
    with staged_folder(output) as staging:
        (staging / "file").write_text("new")


@pytest.mark.parametrize("interrupted", [1, 2])
def test_an_interruption_between_the_renames_leaves_the_old_folder(
    output: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    calls: list[Path] = []
    rename = os.replace

    def rename_then_interrupt(source: Path, target: Path) -> None:
        rename(source, target)
        calls.append(source)
        if len(calls) == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", rename_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace(output)
    # After the second rename the new folder is there, whole.
    assert (output / "file").read_text() == ("old" if interrupted == 1 else "new")
    assert list(output.parent.iterdir()) == [output]


def test_a_folder_that_cannot_be_put_back_is_put_back_by_the_next_build(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.replace, itertools.count()

    def rename_once(source: Path, target: Path) -> None:
        if next(calls):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", rename_once)
        replace(output)
    assert not output.exists()
    remove_abandoned(output)
    assert (output / "file").read_text() == "old"
    assert list(output.parent.iterdir()) == [output]


def test_what_a_killed_build_left_is_cleared_away_and_a_running_one_is_left(output: Path) -> None:
    for name in (".bundle.building-killed", ".bundle.replaced-killed", ".other.building-killed"):
        (output.parent / name).mkdir()
        (output.parent / name / "file").write_text("")
    with staged_folder(output) as running:
        replace(output)
        assert running.is_dir()
    assert {path.name for path in output.parent.iterdir()} == {"bundle", ".other.building-killed"}


@pytest.mark.parametrize("name", ["link", "."])
def test_outputs_of_another_name_are_resolved(
    output: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (output.parent / "link").symlink_to(output)
    monkeypatch.chdir(output if name == "." else output.parent)
    replace(Path(name))
    assert (output / "file").read_text() == "new"
    assert (output.parent / "link").is_symlink()


def test_an_interrupted_replacement_leaves_the_old_bundle(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = content(bundle_copy)
    model = make_tiny_model(tmp_path / "other", seed=2)
    monkeypatch.setattr(export, "measure_parity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(model, bundle_copy)
    assert content(bundle_copy) == before
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "other"}


def test_a_graph_that_is_not_the_model_is_not_published(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_then_change(graph: Graph, *arguments: Any, **options: Any) -> Any:
        spec = export_graph(graph, *arguments, **options)
        if isinstance(norm := getattr(graph.module, "final_layer_norm", None), nn.LayerNorm):
            norm.weight.data *= 1.01
        return spec

    monkeypatch.setattr(component_build, "export_graph", export_then_change)
    with pytest.raises(ParityError, match=r"text_encoder/prompt_embeds is off by 9\.\de-03"):
        build(tiny_model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ExportError, match="is a folder that is not a bundle; it is not overwritten"
    ):
        build(tiny_model, tmp_path)
    with pytest.raises(ExportError, match="is a file"):
        build(tiny_model, tmp_path / "thesis.tex")
    assert content(tmp_path).keys() == {"thesis.tex"}
