"""Bundles of true size, of random weights: do they build, what do they cost?

    python -m benchmarks.full_size FOLDER --family sd15 [--precision fp16] [--keep]

Disk: twice the model's weights (4, 5 and 14 GB in float32). The graphs are those of the real model
(benchmarks/full_size_configs.py); nothing here speaks of image quality. What was measured is put
into docs/benchmarks/full-size.json, and all of that into full-size.md.
"""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.full_size_configs import FAMILIES
from benchmarks.full_size_report import describe
from benchmarks.peers import ROOT
from benchmarks.random_model import make_model
from benchmarks.run import machine
from benchmarks.stage_memory import StageMemory
from engine.batching.batcher import Batcher, generate
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest
from trainer.export import build_bundle
from trainer.quiet import quiet_libraries

RESULTS = ROOT / "docs" / "benchmarks"
# All graphs are open while an image is drawn, and each takes up to twice its weights.
_DRAWN_BYTES = 6 << 30


def measure(folder: Path, family: str, precision: Any) -> dict[str, Any]:
    """Make the model unless it is there, and build its bundle."""
    model, bundle = folder / f"{family}-model", folder / f"{family}-{precision}"
    memory = StageMemory()
    if not (model / "model_index.json").exists():
        memory("make the model", 0, 1)
        make_model(FAMILIES[family], model)
        memory("make the model", 1, 1)
    # One sampler for a few steps: their tables do not depend on the size of the model.
    report = build_bundle(
        model, bundle, precision=precision, samplers=("ddim",), max_steps=20, progress=memory
    )
    if report.parity is None:
        raise SystemExit(f"{bundle} was built before; remove it to measure")
    stages = {name: dataclasses.asdict(stage) for name, stage in memory.stages.items()}
    stages.pop("make the model", None)
    size = sum(file.stat().st_size for file in bundle.iterdir())
    return {
        **machine(),
        "stages": stages,
        "parity": dataclasses.asdict(report.parity),
        "precision": {name: spec.precision for name, spec in report.manifest.components.items()},
        "bundle_mb": size >> 20,
        "image_256_px_4_steps_s": _draw(bundle) if size < _DRAWN_BYTES else None,
    }


def _draw(bundle: Path) -> float:
    pipeline = Pipeline.open(bundle)
    batcher = Batcher(pipeline)
    request = GenerationRequest(prompt="a dog", width=256, height=256, num_inference_steps=4)
    started = time.monotonic()
    generate(batcher, pipeline.plan(request))
    batcher.close()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--keep", action="store_true", help="leave the model and the bundle there")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    quiet_libraries()
    found = measure(arguments.folder, arguments.family, arguments.precision)
    path = arguments.results / "full-size.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[f"{arguments.family} {arguments.precision}"] = found
    path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    path.with_suffix(".md").write_text(describe(results))
    if not arguments.keep:
        for kind in ("model", arguments.precision):
            shutil.rmtree(arguments.folder / f"{arguments.family}-{kind}")


if __name__ == "__main__":
    main()
