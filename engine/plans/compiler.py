"""One ONNX graph compiled to a plan: parsed, held against the manifest, built, written.

TensorRT for RTX compiles for stated compute capabilities on a machine that needs no GPU; TensorRT
for the GPU of the machine. A plan is built with every profile that it will be asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle import ComponentSpec
from engine.errors import BundleError
from engine.files import sha256_of_file
from engine.plans.cache import PlanCache, plan_key
from engine.plans.manifest import PlanSpec
from engine.plans.profiles import Profile
from engine.plans.targets import Target
from engine.plans.tensorrt_module import import_tensorrt, make_logger

# Neither REFIT nor STRIP_PLAN: both need a driver, and concepts are inputs, not weights.
FLAGS = ("STRONGLY_TYPED",)
_MAGIC = {"rtx": b"vtrt"}  # how plans begin, where that is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """A graph to compile, and how."""

    onnx_path: Path
    target: Target
    spec: ComponentSpec
    profiles: Sequence[Profile]
    precision: str = "fp16"  # inside of the graph, as it was exported

    def sources(self) -> dict[str, str]:
        """The graph and its weights, where those are in a file of their own -> SHA-256."""
        data = self.onnx_path.with_name(f"{self.onnx_path.name}.data")
        files = [self.onnx_path, data] if data.exists() else [self.onnx_path]
        return {file.name: sha256_of_file(file) for file in files}

    def key(self, sources: dict[str, str], library: str) -> str:
        dtypes = {t.name: t.dtype for t in (*self.spec.inputs, *self.spec.outputs)}
        return plan_key(
            sources=sources,
            target=self.target,
            library=library,
            flags=FLAGS,
            profiles=self.profiles,
            precision={**dtypes, "": self.precision},
        )


def compile_plan(
    wanted: Compilation, plan_path: Path, *, cache: PlanCache | None = None
) -> PlanSpec:
    """Write the plan of a graph, from the cache if it is there.

    The network is strongly typed: the precision is the graph's. Raises `BundleError` with
    TensorRT's own words if it cannot be parsed or built, or if its tensors are not those of `spec`.
    """
    trt = import_tensorrt(wanted.target.kind)
    sources = wanted.sources()
    key = wanted.key(sources, f"{trt.__name__} {trt.__version__}")
    if cache is None or not cache.fetch(key, plan_path):
        _build(trt, wanted, plan_path)
        if cache is not None:
            cache.keep(key, plan_path)
    return PlanSpec(
        file=plan_path.name,
        sha256=sha256_of_file(plan_path),
        key=key,
        sources=sources,
        precision=wanted.precision,
        inputs=wanted.spec.inputs,
        outputs=wanted.spec.outputs,
        profiles=list(wanted.profiles),
    )


def _build(trt: Any, wanted: Compilation, plan_path: Path) -> None:
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, log, wanted.onnx_path)
    _check_tensors(trt, network, wanted.spec, wanted.onnx_path)
    config = builder.create_builder_config()
    if wanted.target.kind == "rtx":  # TensorRT has no such setting: its GPU is the machine's
        config.num_compute_capabilities = len(wanted.target.capabilities)
        for index, name in enumerate(wanted.target.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    for profile in wanted.profiles:
        _add_profile(builder, config, profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(
            f"{wanted.onnx_path.name} cannot be compiled for {wanted.target}: {log.summary()}"
        )
    _write_plan(plan_path, memoryview(plan), wanted)


def _parse(trt: Any, network: Any, log: Any, onnx_path: Path) -> None:
    parser = trt.OnnxParser(network, log)
    # From the file, not from bytes: external data is looked for beside it.
    if not parser.parse_from_file(str(onnx_path)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        reason = "; ".join(errors[:3]) or log.summary()
        raise BundleError(f"{onnx_path.name} cannot be parsed by TensorRT: {reason}")


def _check_tensors(trt: Any, network: Any, spec: ComponentSpec, onnx_path: Path) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for side, tensors, wanted in (
        ("inputs", inputs, spec.inputs),
        ("outputs", outputs, spec.outputs),
    ):
        found = {t.name: (_dtype_name(trt, t.dtype), len(t.shape)) for t in tensors}
        expected = {t.name: (t.dtype, len(t.shape)) for t in wanted}
        if found != expected:
            raise BundleError(f"{onnx_path.name} has {side} {found}, the manifest says {expected}")
    dynamic = {t.name: [isinstance(axis, str) for axis in t.shape] for t in spec.inputs}
    if frozen := {t.name for t in inputs if [d == -1 for d in t.shape] != dynamic[t.name]}:
        raise BundleError(
            f"{onnx_path.name}: axes of {', '.join(sorted(frozen))} differ in TensorRT"
        )


def _dtype_name(trt: Any, dtype: Any) -> str:
    names = {getattr(trt, name): name for name in ("float32", "float16", "int64", "int32")}
    return names.get(dtype, str(dtype))


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    optimization_profile = builder.create_optimization_profile()
    for name, shapes in profile.items():
        optimization_profile.set_shape(name, *shapes)
    if config.add_optimization_profile(optimization_profile) < 0:
        raise BundleError(f"TensorRT refuses the optimization profile {dict(profile)}")


def _write_plan(path: Path, plan: memoryview, wanted: Compilation) -> None:
    magic = _MAGIC.get(wanted.target.kind, b"")
    if bytes(plan[: len(magic)]) != magic:
        raise BundleError(
            f"the plan of {wanted.onnx_path.name} begins with {bytes(plan[:4])!r}, not {magic!r}"
        )
    path.write_bytes(plan)
