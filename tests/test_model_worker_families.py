"""A family with more inputs draws the same in a process of its own."""

from pathlib import Path

import numpy as np

from engine.pipeline import Pipeline
from engine.worker.remote_model import open_remote
from tests.export_setup import build
from tests.tiny_model import make_tiny_xl_model
from tests.worker_harness import draw_staggered, request, same


def test_a_family_with_two_encoders_and_zeros_for_no_text(tmp_path: Path) -> None:
    bundle = build(make_tiny_xl_model(tmp_path / "xl"), tmp_path / "bundle").path
    here = Pipeline.open(bundle)
    picture = np.random.default_rng(5).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    planner, model = open_remote(bundle)
    try:
        assert here.bundle.manifest.zero_empty_negative
        plans = [
            planner.plan(request("a photo", num_images=2)),  # zeros beside the prompt
            planner.plan(request("a photo", negative_prompt="red")),
            planner.plan(request("a red cat", guidance_scale=1.0, init_image=picture)),
        ]
        assert [plan.zero_negative for plan in plans] == [True, False, False]
        for one, other in zip(
            draw_staggered(here, plans), draw_staggered(model, plans), strict=True
        ):
            assert same(one, other)
    finally:
        model.close()
