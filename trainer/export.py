"""From a diffusers model to a bundle: export, tables, parity gate, publish; then compiled plans."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save

from engine.bundle import (
    FORMAT_VERSION,
    LATENT_RGB,
    MANIFEST,
    SAMPLERS,
    TOKEN_EMBEDDING,
    TOKEN_EMBEDDING_2,
    TOKENIZER,
    TOKENIZER_2,
    Bundle,
    ComponentSpec,
    LatentSpec,
    Manifest,
    read_manifest,
)
from engine.errors import BundleError
from engine.files import sha256_of_file
from engine.plans.targets import Target
from engine.samplers import MAX_INFERENCE_STEPS
from engine.staging import remove_abandoned, staged_folder
from trainer.build_job import BuildJob, Precision, Progress
from trainer.build_key import build_key, package_versions
from trainer.compile_plans import PlanOptions, compile_target, resolve_targets
from trainer.component_build import BuiltComponent, build_component, quantize_component
from trainer.component_memory import Residence
from trainer.model import DiffusionModel, load_model
from trainer.onnx_graphs import ExportError, graphs_of, size_multiple
from trainer.output_folder import is_built, obstacle
from trainer.parity import (
    MAX_RELATIVE_ERROR,
    MIN_PSNR_DB,
    NUM_INFERENCE_STEPS,
    Parity,
    measure_image,
)
from trainer.previews import fit_latent_rgb
from trainer.sampler_tables import SAMPLERS as ALL_SAMPLERS
from trainer.sampler_tables import build_sampler_tables, samplers_key
from trainer.splicing import plain_tokenizer, text_spec

PARITY = "parity.json"
READING = "read the model"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What `build_bundle` did."""

    path: Path
    manifest: Manifest
    parity: Parity | None  # None where the bundle was there already
    compiled: tuple[str, ...]  # targets whose plans were compiled now
    seconds: dict[str, float]  # stage -> time

    @property
    def was_built(self) -> bool:
        return self.parity is not None


def build_bundle(
    model: str | Path,
    output: Path,
    *,
    precision: Precision = "fp32",
    targets: Sequence[str] = (),
    plans: PlanOptions | None = None,
    revision: str | None = None,
    samplers: Sequence[str] | None = None,
    max_steps: int = MAX_INFERENCE_STEPS,
    progress: Progress | None = None,
    parked_bytes: int | None = None,
) -> BuildReport:
    """Build the bundle of a model at `output`, unless it is there already, and plans for `targets`.

    A bundle at `output` is replaced only when the new one is complete and has passed the parity
    gate; plans of targets that are not asked for again go with the old one. A failure leaves
    nothing behind but what was there. Networks of at least `parked_bytes` (by default 256 MB) are
    in memory only while they are needed. Raises `ModelError`, `ExportError`, `SamplerRefused`, or
    an `EngineError` for targets.
    """
    # Now, and not after minutes of export: whatever is missing for them.
    parsed = resolve_targets([Target.parse(target) for target in targets])
    output = output.resolve()  # a link is followed, and `.` has a name
    remove_abandoned(output)
    if reason := obstacle(output):
        raise ExportError(reason)
    residence = Residence(parked_bytes=parked_bytes)
    progress = progress or (lambda stage, done, total: None)
    progress(READING, 0, 1)
    job = _prepare(
        load_model(model, revision=revision, on_read=residence.add),
        residence,
        output,
        precision,
        tuple(ALL_SAMPLERS if samplers is None else samplers),
        max_steps,
        progress,
    )
    progress(READING, 1, 1)
    parity = None
    if not is_built(job.output, job.build_key):
        with staged_folder(output) as folder:
            parity = _build(job, folder)
    manifest = read_manifest(output)
    options = plans or PlanOptions()
    compiled = [target for target in parsed if compile_target(job, manifest, target, options)]
    return BuildReport(
        path=output,
        manifest=manifest,
        parity=parity,
        compiled=tuple(map(str, compiled)),
        seconds=job.seconds,
    )


def _prepare(
    model: DiffusionModel,
    residence: Residence,
    output: Path,
    precision: Precision,
    samplers: tuple[str, ...],
    max_steps: int,
    progress: Progress,
) -> BuildJob:
    if precision not in MIN_PSNR_DB:
        raise ExportError(f"precision must be one of {', '.join(MIN_PSNR_DB)}, got {precision!r}")
    if "ddim" not in samplers or max_steps < NUM_INFERENCE_STEPS:
        raise ExportError(
            f"the parity gate draws with ddim in {NUM_INFERENCE_STEPS} steps, "
            f"samplers are {', '.join(samplers)} of at most {max_steps} steps"
        )
    if model.scheduler_config.get("clip_sample"):
        raise ExportError(
            f"{model.name}: the scheduler has clip_sample true: it bounds predicted latents by 1, "
            "so its steps are no linear table; set clip_sample to false in scheduler_config.json"
        )
    tables_key = samplers_key(model.scheduler_config, names=samplers, max_steps=max_steps)
    return BuildJob(
        model=model,
        graphs=graphs_of(model),
        precision=precision,
        samplers=samplers,
        max_steps=max_steps,
        samplers_key=tables_key,
        build_key=build_key(
            model, precision=precision, samplers_key=tables_key, residence=residence
        ),
        output=output,
        progress=progress,
        residence=residence,
    )


def _build(job: BuildJob, folder: Path) -> Parity:
    """Fill an empty folder with a bundle and put it through the parity gate."""
    built = {graph.name: build_component(job, graph, folder) for graph in job.graphs}
    components = {name: component.spec for name, component in built.items()}
    _write_tokens(job.model, folder)
    with job.stage("previews"), job.residence.of("vae"):
        (folder / LATENT_RGB).write_bytes(save({"latent_rgb": fit_latent_rgb(job.model)}))
    _write_samplers(job, folder)
    if job.precision == "int8":
        _write_manifest(job, folder, components)
        built["denoiser"] = quantize_component(job, built["denoiser"], folder)
        components["denoiser"] = built["denoiser"].spec
    with job.stage("check the image"):
        manifest = _write_manifest(job, folder, components)
        parity = measure_parity(Bundle.open(folder), job, built)
        precisions = {name: str(spec.precision) for name, spec in components.items()}
        parity.check(precisions, job.precision)
        _write_parity(job, folder, parity, precisions)
        _write_manifest(job, folder, components, hashed=manifest.files)
    return parity


def measure_parity(bundle: Bundle, job: BuildJob, built: dict[str, BuiltComponent]) -> Parity:
    """What the gate has found of the components, and finds of a whole image."""
    return Parity(
        max_relative_error={name: component.errors for name, component in built.items()},
        image_psnr_db=measure_image(bundle, job.model, job.residence),
        float32_islands={name: one.island for name, one in built.items() if one.island},
    )


def _write_tokens(model: DiffusionModel, folder: Path) -> None:
    # Written by Python, whose errors are OSErrors: the libraries' own classes name no file.
    names = ((TOKENIZER, TOKEN_EMBEDDING), (TOKENIZER_2, TOKEN_EMBEDDING_2))
    for encoder, (tokenizer_name, table_name) in zip(model.encoders, names, strict=False):
        tokenizer = plain_tokenizer(encoder).to_str(pretty=True)
        (folder / tokenizer_name).write_text(tokenizer, encoding="utf-8")
        table = save({"token_embedding": encoder.token_embedding.numpy()})
        (folder / table_name).write_bytes(table)


def _write_samplers(job: BuildJob, folder: Path) -> None:
    with job.stage("samplers"):
        if _has_same_samplers(job):
            shutil.copyfile(job.output / SAMPLERS, folder / SAMPLERS)
            return
        build_sampler_tables(
            job.model.scheduler_config,
            folder / SAMPLERS,
            names=job.samplers,
            max_steps=job.max_steps,
            progress=lambda done, total: job.progress("samplers", min(done, total - 1), total),
        )


def _has_same_samplers(job: BuildJob) -> bool:
    """Whether the bundle that is about to be replaced has the tables that would be made."""
    path = job.output / SAMPLERS
    try:
        if sha256_of_file(path) != read_manifest(job.output).files[SAMPLERS]:
            return False
    except (BundleError, OSError, KeyError):
        return False
    with safe_open(str(path), framework="numpy") as file:
        return (file.metadata() or {}).get("key") == job.samplers_key


def _write_manifest(
    job: BuildJob,
    folder: Path,
    components: dict[str, ComponentSpec],
    hashed: Mapping[str, str] | None = None,
) -> Manifest:
    """Write `bundle.json` over the files that are there; `hashed` are known to be unchanged."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: (hashed or {}).get(name) or sha256_of_file(path) for name, path in names.items()}
    model = job.model
    first, *second = (text_spec(encoder) for encoder in model.encoders)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        family=model.family.name,
        model_name=model.name,
        precision=job.precision,
        prediction_type=model.prediction_type,
        scheduler_config=model.scheduler_config,
        text=first,
        text_2=second[0] if second else None,
        zero_empty_negative=model.zero_empty_negative,
        latents=_latent_spec(model),
        components=components,
        files=files,
        build_key=job.build_key,
        versions=package_versions(),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _latent_spec(model: DiffusionModel) -> LatentSpec:
    multiple = size_multiple(model.unet) * model.scale_factor
    size = model.unet.config["sample_size"]
    default_size = (max(size) if isinstance(size, list | tuple) else size) * model.scale_factor
    return LatentSpec(
        channels=model.unet.config["in_channels"],
        scale_factor=model.scale_factor,
        size_multiple=multiple,
        default_size=-(-default_size // multiple) * multiple,
        scaling_factor=model.scaling_factor,
        shift_factor=model.shift_factor,
    )


def _write_parity(job: BuildJob, folder: Path, parity: Parity, precisions: dict[str, str]) -> None:
    report = {
        **dataclasses.asdict(parity),
        "precision": precisions,
        "limits": {
            "max_relative_error": {
                name: MAX_RELATIVE_ERROR[precision] for name, precision in precisions.items()
            },
            "min_image_psnr_db": MIN_PSNR_DB[job.precision],
        },
    }
    text = json.dumps(report, indent=2, sort_keys=True) + "\n"
    (folder / PARITY).write_text(text, encoding="utf-8")
