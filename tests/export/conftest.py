"""A tiny model and its bundle, for the tests of this folder."""

import shutil
from pathlib import Path

import pytest

from tests.export_setup import build
from tests.tiny_model import make_tiny_model
from trainer.export import BuildReport


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def report(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    return build(tiny_model, tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def bundle_copy(report: BuildReport, tmp_path: Path) -> Path:
    return Path(shutil.copytree(report.path, tmp_path / "bundle"))


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))
