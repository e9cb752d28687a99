"""From a Stable Diffusion that `optimum` exported to a bundle, by graph surgery: no PyTorch.

Only the sampler tables need diffusers, and through it PyTorch; they can be taken over from another
bundle of the same noise schedule instead.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from engine.bundle import (
    FORMAT_VERSION,
    LATENT_RGB,
    MANIFEST,
    SAMPLERS,
    TOKEN_EMBEDDING,
    TOKENIZER,
    Bundle,
    ComponentSpec,
    LatentSpec,
    Manifest,
    TextSpec,
    read_manifest,
)
from engine.errors import BundleError
from engine.files import sha256_of_file
from engine.fingerprint import embedding_fingerprint
from engine.samplers import MAX_INFERENCE_STEPS
from engine.sessions import OnnxSession
from engine.staging import remove_abandoned, staged_folder
from trainer.optimum_folder import ImportRefused, OptimumFolder, read_optimum_folder
from trainer.optimum_graphs import COMPONENTS, MAX_RELATIVE_ERROR, change_graph, measure
from trainer.output_folder import is_built, obstacle
from trainer.sources import digest_of_sources

PARITY = "parity.json"
_SOURCES = (
    "engine/bundle.py",
    "engine/fingerprint.py",
    "trainer/clip_tokenizer.py",
    "trainer/onnx_surgery.py",
    "trainer/optimum_folder.py",
    "trainer/optimum_graphs.py",
    "trainer/optimum_import.py",
)
_PACKAGES = ("onnx", "onnxruntime")
# StableDiffusionPipeline sets these two, whatever the file says (docs/bundle.md).
_CORRECTED = {"steps_offset": 1, "clip_sample": False}
_NUM_SAMPLES, _COARSE, _FINE = 24, 4, 12  # of latents for the preview map; a side


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What `import_optimum` did."""

    path: Path
    manifest: Manifest
    errors: dict[str, float]  # component -> error against optimum's graph; {} where it was there


def import_optimum(
    source: Path,
    output: Path,
    *,
    samplers_from: Path | None = None,
    samplers: Sequence[str] | None = None,
    max_steps: int = MAX_INFERENCE_STEPS,
) -> ImportReport:
    """Build a bundle at `output` from a folder that optimum wrote, unless it is there already.

    Every graph is held against the one it was made of before the bundle is published; a failure
    leaves what was there. `samplers_from` is a bundle whose sampler tables are taken over. Raises
    `ImportRefused`, `SurgeryError`, `TokenizerUnreadable`, `BundleError`, and `SamplerRefused`.
    """
    output = output.resolve()
    remove_abandoned(output)
    folder = read_optimum_folder(source)
    if reason := obstacle(output):
        raise ImportRefused(reason)
    if samplers_from is not None:
        _check_samplers(folder, read_manifest(samplers_from))
    key = _build_key(folder, samplers, max_steps)
    if is_built(output, key):
        return ImportReport(path=output, manifest=read_manifest(output), errors={})
    with staged_folder(output) as staging:
        components, text = _write_graphs(folder, staging)
        errors = _measured(folder, staging)
        (staging / LATENT_RGB).write_bytes(save({"latent_rgb": fit_latent_rgb(folder, staging)}))
        config = _write_samplers(folder, staging, samplers_from, samplers, max_steps)
        report = {"against": "optimum", "limit": MAX_RELATIVE_ERROR, "max_relative_error": errors}
        (staging / PARITY).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            family="stable-diffusion",
            model_name=folder.name,
            precision="fp32",
            prediction_type=folder.prediction_type,
            scheduler_config=config,
            text=text,
            latents=_latent_spec(folder),
            components=components,
            files={
                path.name: sha256_of_file(path)
                for path in sorted(staging.iterdir())
                if path.is_file()
            },
            build_key=key,
            versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        )
        (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        Bundle.open(staging)
    return ImportReport(path=output, manifest=manifest, errors=errors)


def _build_key(folder: OptimumFolder, samplers: Sequence[str] | None, max_steps: int) -> str:
    described = {
        "sources": digest_of_sources(_SOURCES),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "name": folder.name,
        "model": folder.digest(),
        "samplers": None if samplers is None else list(samplers),
        "max_steps": max_steps,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _write_graphs(
    folder: OptimumFolder, staging: Path
) -> tuple[dict[str, ComponentSpec], TextSpec]:
    """Graphs, table and tokenizer; returns what the manifest says of them."""
    components: dict[str, ComponentSpec] = {}
    table: np.ndarray | None = None
    for component in COMPONENTS:
        changed = change_graph(folder, component, staging)
        components[component] = changed.spec
        table = changed.table if table is None else table
    assert table is not None
    vocabulary = folder.tokenizer
    if table.shape[0] != vocabulary.tokenizer.get_vocab_size():
        raise ImportRefused(
            f"{folder.path}: the tokenizer has {vocabulary.tokenizer.get_vocab_size()} tokens, the "
            f"table in text_encoder/model.onnx {table.shape[0]} rows"
        )
    (staging / TOKEN_EMBEDDING).write_bytes(save({"token_embedding": np.ascontiguousarray(table)}))
    (staging / TOKENIZER).write_text(vocabulary.tokenizer.to_str(pretty=True), encoding="utf-8")
    return components, TextSpec(
        max_tokens=folder.max_tokens,
        dim=table.shape[1],
        output_dim=int(folder.text["hidden_size"]),
        vocab_size=table.shape[0],
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
        embedding_fingerprint=embedding_fingerprint(table),
    )


def _measured(folder: OptimumFolder, staging: Path) -> dict[str, float]:
    """The gate: what was changed computes what it did before."""
    with safe_open(str(staging / TOKEN_EMBEDDING), framework="numpy") as file:
        table = file.get_tensor("token_embedding")
    errors = {name: measure(folder, name, staging, table) for name in COMPONENTS}
    for name, error in errors.items():
        if not error <= MAX_RELATIVE_ERROR:
            raise ImportRefused(
                f"{name} is off by {error:.1e} of its range from {folder.graph_path(name)}, the "
                f"limit is {MAX_RELATIVE_ERROR:g}; nothing was published. Build from the diffusers "
                "folder instead (--model)"
            )
    return errors


def fit_latent_rgb(folder: OptimumFolder, bundle: Path) -> Float32[np.ndarray, "channels_plus_1 3"]:
    """Least squares from smooth random latents to decoded RGB, as trainer/previews.py fits it."""
    rng = np.random.default_rng(0)
    decoder = OnnxSession(bundle / "vae_decoder.onnx")
    inputs: list[np.ndarray] = []
    colours: list[np.ndarray] = []
    for _ in range(_NUM_SAMPLES):
        coarse = rng.standard_normal((folder.channels, _COARSE, _COARSE)).astype(np.float32)
        latents = np.stack(
            [
                np.asarray(Image.fromarray(one).resize((_FINE, _FINE), Image.Resampling.BICUBIC))
                for one in coarse
            ]
        )
        pixels = decoder.run({"latents": latents[None]})["images"][0].clip(-1.0, 1.0)
        cells = pixels.reshape(3, _FINE, folder.scale_factor, _FINE, folder.scale_factor)
        inputs.append(latents.reshape(folder.channels, -1).T)
        colours.append(cells.mean(axis=(2, 4)).reshape(3, -1).T)
    known = np.concatenate(inputs).astype(np.float64)
    known = np.concatenate([known, np.ones((len(known), 1))], axis=1)
    solution = np.linalg.lstsq(known, np.concatenate(colours).astype(np.float64), rcond=None)[0]
    return solution.astype(np.float32)


def _latent_spec(folder: OptimumFolder) -> LatentSpec:
    multiple = folder.size_multiple * folder.scale_factor
    size = folder.unet["sample_size"]
    default_size = (max(size) if isinstance(size, list) else int(size)) * folder.scale_factor
    return LatentSpec(
        channels=folder.channels,
        scale_factor=folder.scale_factor,
        size_multiple=multiple,
        default_size=-(-default_size // multiple) * multiple,
        scaling_factor=folder.scaling_factor,
        shift_factor=folder.shift_factor,
    )


def _write_samplers(
    folder: OptimumFolder,
    staging: Path,
    samplers_from: Path | None,
    samplers: Sequence[str] | None,
    max_steps: int,
) -> dict[str, Any]:
    """Write the tables; returns the scheduler config that they are of."""
    if samplers_from is not None:
        manifest = read_manifest(samplers_from)
        shutil.copyfile(samplers_from / SAMPLERS, staging / SAMPLERS)
        if sha256_of_file(staging / SAMPLERS) != manifest.files[SAMPLERS]:
            raise BundleError(f"{samplers_from / SAMPLERS} is corrupted; build that bundle again")
        return manifest.scheduler_config
    try:
        from trainer.model import read_scheduler_config
        from trainer.sampler_tables import build_sampler_tables
    except ImportError as error:
        raise ImportRefused(
            f"{error}; sampler tables are read off diffusers' schedulers: install oneword[train], "
            "or take them from a bundle of the same schedule with --samplers-from BUNDLE"
        ) from error
    config = read_scheduler_config(str(folder.path), None, folder.scheduler_class, corrected=True)
    build_sampler_tables(config, staging / SAMPLERS, names=samplers, max_steps=max_steps)
    return config


def _check_samplers(folder: OptimumFolder, manifest: Manifest) -> None:
    """Refuse tables of another noise schedule than the model's."""
    wanted = {**folder.scheduler, **_CORRECTED}
    theirs = manifest.scheduler_config
    differing = [
        f"{key} ({theirs[key]!r}, this model has {wanted.get(key)!r})"
        for key in theirs
        if not key.startswith("_") and theirs[key] != wanted.get(key)
    ]
    if differing:
        raise ImportRefused(
            f"the sampler tables of {manifest.model_name} are of another schedule: "
            f"{', '.join(differing)}; take those of another bundle, or leave --samplers-from out"
        )
