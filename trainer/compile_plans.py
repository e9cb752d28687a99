"""Compiled plans for a bundle that stands: exported in float16, compiled, put into its folder."""

import hashlib
import json
from pathlib import Path

from engine.bundle import Manifest
from engine.errors import BundleError
from engine.plans import (
    FORMAT_VERSION,
    PLAN_MANIFEST,
    PLANS_FOLDER,
    PRECISION,
    PlanManifest,
    PlanSpec,
    Target,
    compile_plan,
    import_tensorrt_rtx,
    profile_of,
    read_plan_manifest,
)
from trainer.build_job import BuildJob
from trainer.onnx_graphs import Graph, export_graph
from trainer.sources import digest_of_sources
from trainer.staging import locked_folder, staged_folder

SOURCES = ("engine/plans.py", "trainer/compile_plans.py")


def compile_target(job: BuildJob, manifest: Manifest, target: Target) -> bool:
    """Compile the plans of a target into the bundle; False if they are there already."""
    folder = job.output / PLANS_FOLDER / target.folder
    key = plan_key(target)
    if _has_plans(folder, manifest, key):
        return False
    with (
        staged_folder(folder) as staging,
        locked_folder(job.output, "building") as scratch,
    ):
        plans = {
            graph.name: _compile_graph(job, manifest, target, graph, staging, scratch)
            for graph in job.graphs
        }
        plan_manifest = PlanManifest(
            format_version=FORMAT_VERSION,
            target=str(target),
            tensorrt_rtx_version=import_tensorrt_rtx().__version__,
            precision=PRECISION,
            bundle_build_key=manifest.build_key,
            plan_key=key,
            components=plans,
        )
        (staging / PLAN_MANIFEST).write_text(plan_manifest.to_json(), encoding="utf-8")
    return True


def plan_key(target: Target) -> str:
    """SHA-256 over what decides how a bundle's graphs are compiled: target, compiler and code."""
    made_of = {
        "sources": digest_of_sources(SOURCES),
        "target": str(target),
        "tensorrt_rtx": import_tensorrt_rtx().__version__,
        "precision": PRECISION,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _has_plans(folder: Path, manifest: Manifest, key: str) -> bool:
    """Whether sound plans of this bundle, compiled as they would be now, are there."""
    try:
        return read_plan_manifest(folder, build_key=manifest.build_key).plan_key == key
    except BundleError:
        return False


def _compile_graph(
    job: BuildJob, manifest: Manifest, target: Target, graph: Graph, staging: Path, scratch: Path
) -> PlanSpec:
    """Compile one graph: the bundle's own if it is float16, else one exported for the purpose."""
    with job.stage(f"compile {graph.name} for {target}"):
        folder, spec = job.output, manifest.components[graph.name]
        if job.precision != PRECISION:
            folder, spec = scratch, export_graph(graph, scratch, precision=PRECISION)
        return compile_plan(
            folder / spec.file,
            staging / f"{graph.name}.plan",
            target=target,
            spec=spec,
            profile=profile_of(graph.name, spec, manifest),
        )
