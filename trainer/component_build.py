"""One component of a bundle: exported, compared with its module, put into float32 if it must be."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from engine.bundle import ComponentSpec
from engine.sessions import OnnxSession
from trainer.build_job import BuildJob
from trainer.calibration import quantize_denoiser
from trainer.component_memory import free_memory
from trainer.onnx_graphs import Graph, export_graph
from trainer.parity import (
    Reference,
    check_component,
    component_errors,
    reason_for_float32,
    record_reference,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltComponent:
    """A graph that has passed its part of the gate."""

    spec: ComponentSpec
    errors: dict[str, float]
    graph: Graph
    reference: Reference
    island: str | None = None  # why it is float32 in a float16 bundle


def build_component(job: BuildJob, graph: Graph, folder: Path) -> BuiltComponent:
    """Export a graph and compare it with its module; in float32 if it does not bear float16.

    What a config says of that (`force_upcast`) is not asked: it is tried and measured.
    """
    half = job.precision == "fp16"
    tried = dataclasses.replace(graph, needs_float32=False) if half else graph
    with job.residence.of(graph.name):
        with job.stage(f"export {graph.name}"):
            # TensorRT may be given the graphs of a float16 bundle: standard operators alone.
            spec = export_graph(tried, folder, precision=job.precision, fused_attention=not half)
        with job.stage(f"run {graph.name} in PyTorch"):
            reference = record_reference(graph, activations=half)
    errors = _errors(job, graph, folder / spec.file, reference)
    island = reason_for_float32(reference, errors) if half else None
    if island is not None:
        with job.residence.of(graph.name), job.stage(f"export {graph.name} in float32"):
            (folder / f"{spec.file}.data").unlink(missing_ok=True)
            spec = export_graph(graph, folder, precision="fp32")
        errors = _errors(job, graph, folder / spec.file, reference)
    check_component(graph, errors, str(spec.precision))
    return BuiltComponent(spec=spec, errors=errors, graph=graph, reference=reference, island=island)


def quantize_component(job: BuildJob, built: BuiltComponent, folder: Path) -> BuiltComponent:
    """Put the denoiser, which has passed the gate in float32, into 8 bits; measure it again.

    The folder must be a complete float32 bundle, which is drawn with to see the ranges.
    """
    with job.stage("calibration"):
        quantize_denoiser(folder)
    spec = dataclasses.replace(built.spec, precision="int8")
    errors = _errors(job, built.graph, folder / spec.file, built.reference)
    return dataclasses.replace(built, spec=spec, errors=errors)


def _errors(job: BuildJob, graph: Graph, file: Path, reference: Reference) -> dict[str, float]:
    with job.stage(f"check {graph.name}"):
        errors = component_errors(graph, OnnxSession(file), reference)
        free_memory()
        return errors
