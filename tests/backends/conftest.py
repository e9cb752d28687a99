"""A small float16 bundle with plans by the real compiler, shared by the tests of backends."""

from pathlib import Path

import pytest

from engine.backends.device_model import history_of
from engine.backends.step_graphs import step_graphs
from engine.bundle import Bundle
from tests.tiny_model import make_tiny_model

SAMPLERS = ("ddim", "euler_a", "dpmpp_2m", "pndm")
TARGET = "rtx:sm86,sm89"


@pytest.fixture(scope="session")
def compiled_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 x 24 pixels by default; plans for that size and for 8 x 8 to 40 x 40."""
    pytest.importorskip("tensorrt_rtx")
    from trainer.export import build_bundle

    folder = tmp_path_factory.mktemp("compiled")
    model = make_tiny_model(folder / "model")
    build_bundle(
        model,
        folder / "bundle",
        precision="fp16",
        samplers=SAMPLERS,
        max_steps=8,
        targets=[TARGET],
    )
    return folder / "bundle"


@pytest.fixture(scope="session")
def step_graph_folder(compiled_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs between the denoiser's calls, as they were compiled."""
    folder = tmp_path_factory.mktemp("graphs")
    bundle = Bundle.open(compiled_bundle)
    for graph in step_graphs(bundle.manifest, history_of(bundle.sampler_tables)).values():
        graph.write(folder)
    return folder
