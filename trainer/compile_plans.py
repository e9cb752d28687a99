"""Compiled plans for a bundle that stands: exported in float16, compiled, put into its folder."""

import tempfile
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
from trainer.staging import staged_folder


def compile_target(job: BuildJob, manifest: Manifest, target: Target) -> bool:
    """Compile the plans of a target into the bundle; False if they are there already."""
    folder = job.output / PLANS_FOLDER / target.folder
    if _has_plans(folder, manifest):
        return False
    with (
        staged_folder(folder) as staging,
        tempfile.TemporaryDirectory(
            dir=job.output.parent, prefix=f".{job.output.name}.float16-"
        ) as scratch,
    ):
        plans = {
            graph.name: _compile_graph(job, manifest, target, graph, staging, Path(scratch))
            for graph in job.graphs
        }
        plan_manifest = PlanManifest(
            format_version=FORMAT_VERSION,
            target=str(target),
            tensorrt_rtx_version=import_tensorrt_rtx().__version__,
            precision=PRECISION,
            bundle_build_key=manifest.build_key,
            components=plans,
        )
        (staging / PLAN_MANIFEST).write_text(plan_manifest.to_json(), encoding="utf-8")
    return True


def _has_plans(folder: Path, manifest: Manifest) -> bool:
    """Whether sound plans of this bundle, from the installed compiler, are there."""
    try:
        plans = read_plan_manifest(folder, build_key=manifest.build_key)
    except BundleError:
        return False
    return plans.tensorrt_rtx_version == import_tensorrt_rtx().__version__


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
