"""Compiled plans for a bundle that stands: exported in float16, compiled, put into its folder."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.backends.cuda_device import find_gpu
from engine.backends.device_model import history_of
from engine.backends.step_graphs import step_graphs
from engine.bundle import SAMPLERS, ComponentSpec, Manifest
from engine.errors import BundleError, ProviderUnavailable
from engine.plans.cache import RECIPE, PlanCache
from engine.plans.compiler import FLAGS, Compilation, compile_plan
from engine.plans.manifest import (
    FORMAT_VERSION,
    PLAN_MANIFEST,
    PLANS_FOLDER,
    PlanManifest,
    PlanSpec,
    read_plan_manifest,
)
from engine.plans.profiles import Bucket, buckets_of, profiles_of
from engine.plans.targets import Target
from engine.plans.tensorrt_module import MODULES, import_tensorrt
from engine.samplers import read_sampler_tables
from engine.staging import locked_folder, staged_folder
from trainer.build_job import BuildJob
from trainer.onnx_graphs import Graph, export_graph
from trainer.sources import digest_of_sources

PRECISION = "fp16"  # of the graphs compiled; those that overflow in float16 are float32
SOURCES = (
    "engine/backends/step_graphs.py",
    "engine/plans/cache.py",
    "engine/plans/compiler.py",
    "engine/plans/manifest.py",
    "engine/plans/profiles.py",
    "engine/plans/targets.py",
    "engine/plans/tensorrt_module.py",
    "trainer/compile_plans.py",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What can be said about plans beside their targets."""

    buckets: Sequence[str] = ()  # sizes with a profile of their own; none: chosen for the model
    cache: Path | None = None  # folder of plans by content, for all bundles


def resolve_targets(targets: Sequence[Target]) -> list[Target]:
    """The targets with `trt:native` as what it is here; each once.

    Raises `ProviderUnavailable` for what cannot be compiled on this machine.
    """
    return list(dict.fromkeys(_resolve(target) for target in targets))


def _resolve(target: Target) -> Target:
    import_tensorrt(target.kind)
    if target.kind == "rtx":
        return target
    gpu = find_gpu()
    if not target.is_native and target.capabilities != (gpu.capability,):
        raise ProviderUnavailable(
            f"{target} must be compiled on such a GPU; this machine's {gpu.name} is "
            f"{gpu.capability}"
        )
    return Target((gpu.capability,), "trt")


def compile_target(job: BuildJob, manifest: Manifest, target: Target, options: PlanOptions) -> bool:
    """Compile the plans of a target into the bundle; False if they are there already."""
    folder = job.output / PLANS_FOLDER / target.folder
    buckets = buckets_of(manifest.latents, options.buckets)
    key = plan_key(target, buckets)
    if _has_plans(folder, manifest, key):
        return False
    with (
        staged_folder(folder) as staging,
        locked_folder(job.output, "building") as scratch,
    ):
        compiler = _Compiler(job, manifest, target, buckets, options.cache, staging, scratch)
        plans = {graph.name: compiler.component(graph) for graph in job.graphs}
        plans |= compiler.step_plans(plans)
        plan_manifest = PlanManifest(
            format_version=FORMAT_VERSION,
            target=str(target),
            library=MODULES[target.kind],
            library_version=import_tensorrt(target.kind).__version__,
            buckets=[str(bucket) for bucket in buckets],
            bundle_build_key=manifest.build_key,
            plan_key=key,
            components=plans,
        )
        (staging / PLAN_MANIFEST).write_text(plan_manifest.to_json(), encoding="utf-8")
    return True


def plan_key(target: Target, buckets: Sequence[Bucket]) -> str:
    """SHA-256 over what decides how a bundle's graphs are compiled: target, compiler and code."""
    made_of = {
        "sources": digest_of_sources(SOURCES),
        "recipe": RECIPE,
        "target": str(target),
        "buckets": [str(bucket) for bucket in buckets],
        "flags": FLAGS,
        MODULES[target.kind]: import_tensorrt(target.kind).__version__,
        "precision": PRECISION,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _has_plans(folder: Path, manifest: Manifest, key: str) -> bool:
    """Whether sound plans of this bundle, compiled as they would be now, are there."""
    try:
        return read_plan_manifest(folder, build_key=manifest.build_key).plan_key == key
    except BundleError:
        return False


@dataclass(frozen=True, slots=True)
class _Compiler:
    """One target of one bundle."""

    job: BuildJob
    manifest: Manifest
    target: Target
    buckets: Sequence[Bucket]
    cache: Path | None
    staging: Path  # where plans go
    scratch: Path  # where graphs are exported that only plans need

    def component(self, graph: Graph) -> PlanSpec:
        """Compile the bundle's own graph if it is float16, else one exported for the purpose."""
        with self.job.stage(f"compile {graph.name} for {self.target}"):
            folder, spec = self.job.output, self.manifest.components[graph.name]
            if self.job.precision != PRECISION:
                with self.job.residence.of(graph.name):
                    spec = export_graph(graph, self.scratch, precision=PRECISION)
                folder = self.scratch
            return self._compile(graph.name, folder, spec, str(spec.precision))

    def step_plans(self, components: Mapping[str, PlanSpec]) -> dict[str, PlanSpec]:
        """Compile what is between the denoiser's calls, in the dtypes of the components' plans."""
        with self.job.stage(f"compile the sampler's step for {self.target}"):
            specs = {
                name: ComponentSpec(file=plan.file, inputs=plan.inputs, outputs=plan.outputs)
                for name, plan in components.items()
            }
            compiled = dataclasses.replace(self.manifest, components=specs)
            history = history_of(read_sampler_tables(self.job.output / SAMPLERS))
            plans = dict[str, PlanSpec]()
            for name, graph in step_graphs(compiled, history).items():
                graph.write(self.scratch)
                plans[name] = self._compile(name, self.scratch, graph.spec, "fp32")
            return plans

    def _compile(self, name: str, folder: Path, spec: ComponentSpec, precision: str) -> PlanSpec:
        wanted = Compilation(
            onnx_path=folder / spec.file,
            target=self.target,
            spec=spec,
            profiles=profiles_of(name, spec, self.manifest, self.buckets),
            precision=precision,
        )
        cache = None if self.cache is None else PlanCache(self.cache)
        return compile_plan(wanted, self.staging / f"{name}.plan", cache=cache)
