"""What a bundle was built from, as one hash: equal keys, equal bundles."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence

from trainer.component_memory import Residence
from trainer.fingerprint import model_fingerprint
from trainer.model import DiffusionModel
from trainer.sources import digest_of_sources

PACKAGES = ("torch", "diffusers", "transformers", "onnx")
# The code that decides what is in a bundle and whether it is published; the samplers' has its own
# key (trainer.sampler_tables.samplers_key).
SOURCES = (
    "engine/bundle.py",
    "engine/families.py",
    "engine/fingerprint.py",
    "engine/samplers.py",
    "trainer/activations.py",
    "trainer/attention_fusion.py",
    "trainer/build_key.py",
    "trainer/calibration.py",
    "trainer/component_build.py",
    "trainer/component_memory.py",
    "trainer/encoder_modules.py",
    "trainer/export.py",
    "trainer/families.py",
    "trainer/fingerprint.py",
    "trainer/ldm_pipeline.py",
    "trainer/model.py",
    "trainer/onnx_graphs.py",
    "trainer/onnx_surgery.py",
    "trainer/parity.py",
    "trainer/previews.py",
    "trainer/quantization.py",
    "trainer/splicing.py",
    "trainer/weightless.py",
)


def package_versions() -> dict[str, str]:
    """The versions that decide what an export looks like."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def build_key(
    model: DiffusionModel,
    *,
    precision: str,
    samplers_key: str,
    sources: Sequence[str] = SOURCES,
    residence: Residence | None = None,
) -> str:
    """SHA-256 over the model, options, versions and the exporter's own code.

    Of the loaded parts and not of the files, so that a hub id and a folder are treated alike.
    """
    described = {
        "sources": digest_of_sources(sources),
        "precision": precision,
        "samplers": samplers_key,
        "versions": package_versions(),
        "name": model.name,
        "model": model_fingerprint(model, (residence or Residence()).of),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
