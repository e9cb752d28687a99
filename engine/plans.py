"""Plans: graphs compiled ahead of time by TensorRT for RTX; alone in importing tensorrt_rtx.

A plan is built on a machine that needs no GPU, for stated compute capabilities; one plan serves
several. Beside the plans of a target lies `plan.json`, and nothing is handed to a deserializer that
`read_plan_manifest` has not checked against it. A plan is code: take it from whom you trust.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle import ComponentSpec, Manifest, TensorSpec
from engine.errors import BundleError, ProviderUnavailable
from engine.files import sha256_of_file

FORMAT_VERSION = 2
PLAN_MANIFEST = "plan.json"
PLANS_FOLDER = "plans"
# What tensorrt_rtx.ComputeCapability offers (1.4 to 1.7): Turing, Ampere, Ada and Blackwell.
CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
PRECISION = "fp16"
_MAGIC = b"vtrt"

# Smallest, most usual and largest length of the batch axes.
_TEXT_RANGE = (1, 2, 8)
_BATCH_RANGES = {
    "text_encoder": _TEXT_RANGE,
    "text_encoder_2": _TEXT_RANGE,
    "denoiser": (1, 2, 16),
    "vae": (1, 1, 4),
}
_MAX_CHUNKS = 3  # prompt chunks that a plan's denoiser takes at most

ShapeRange = tuple[list[int], list[int], list[int]]  # smallest, optimal, largest


@dataclass(frozen=True, slots=True)
class Target:
    """What to compile for: `rtx:sm86,sm89` on the command line."""

    capabilities: tuple[str, ...]  # of CAPABILITIES, in its order

    def __str__(self) -> str:
        return f"rtx:{','.join(self.capabilities)}"

    @property
    def folder(self) -> str:
        """Its folder under `plans/`."""
        return "-".join(("rtx", *self.capabilities))

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read `rtx:smXX[,smYY...]`; raises `ProviderUnavailable` for what is not known."""
        kind, _, listed = text.lower().partition(":")
        wanted = {name.strip() for name in listed.split(",") if name.strip()}
        known = ", ".join(CAPABILITIES)
        if kind != "rtx" or not wanted:
            raise ProviderUnavailable(
                f"unknown target {text!r}; write rtx:SM[,SM...] with SM of {known}"
            )
        if unknown := sorted(wanted - set(CAPABILITIES)):
            hopper = "sm90" in unknown
            raise ProviderUnavailable(
                f"unknown compute capability {', '.join(unknown)} in target {text!r}; TensorRT for "
                f"RTX compiles for {known}"
                + ("; Hopper (sm90) is not supported by TensorRT for RTX" if hopper else "")
            )
        return cls(tuple(name for name in CAPABILITIES if name in wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """One compiled graph."""

    file: str
    sha256: str
    sources: dict[str, str]  # the ONNX file it was compiled from, and its weights -> SHA-256
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    profile: dict[str, ShapeRange]  # input -> shapes that it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanManifest:
    """`plan.json`, field for field."""

    format_version: int
    target: str
    tensorrt_rtx_version: str
    precision: str  # of the graphs compiled; those that overflow in float16 are float32 inside
    bundle_build_key: str  # of the bundle that the plans belong to
    plan_key: str  # SHA-256 of what decided how they were compiled (trainer/compile_plans.py)
    components: dict[str, PlanSpec]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> "PlanManifest":
        try:
            fields = json.loads(text)
            if (version := fields.get("format_version")) != FORMAT_VERSION:
                raise BundleError(
                    f"{source} has format_version {version}, this version reads {FORMAT_VERSION}; "
                    "compile the target again with build_engines.py"
                )
            fields["components"] = {
                name: _plan_spec(spec) for name, spec in fields["components"].items()
            }
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{source} is not a plan manifest: {error}") from error


def _plan_spec(fields: Mapping[str, Any]) -> PlanSpec:
    tensors = {
        side: [TensorSpec(**spec) for spec in fields[side]] for side in ("inputs", "outputs")
    }
    profile: dict[str, ShapeRange] = {
        name: (list(low), list(usual), list(high))
        for name, (low, usual, high) in fields["profile"].items()
    }
    converted: dict[str, Any] = {**fields, **tensors, "profile": profile}
    return PlanSpec(**converted)


def read_plan_manifest(folder: Path, *, build_key: str) -> PlanManifest:
    """Read `plan.json`, verify its target, its bundle and every plan's hash; deserializes nothing.

    `build_key` is the bundle's; the target must be the one that `folder` is named after. Raises
    `BundleError` that names the file and both sides.
    """
    path = folder / PLAN_MANIFEST
    if not path.is_file():
        raise BundleError(f"no plans at {folder}: {PLAN_MANIFEST} is missing")
    manifest = PlanManifest.from_json(
        path.read_text(encoding="utf-8", errors="replace"), source=str(path)
    )
    if manifest.bundle_build_key != build_key:
        raise BundleError(
            f"the plans at {folder} were compiled from build {manifest.bundle_build_key[:12]}..., "
            f"the bundle is build {build_key[:12]}...; compile the target again"
        )
    if _folder_of(manifest.target) != folder.name:
        raise BundleError(
            f"the plans at {folder} were compiled for {manifest.target}, the folder is not "
            "named after that target; compile the target again"
        )
    for plan in manifest.components.values():
        _verify(folder, plan)
    return manifest


def _folder_of(target: str) -> str | None:
    """The folder of a target that a file names; None where there is no such target."""
    try:
        return Target.parse(str(target)).folder
    except ProviderUnavailable:
        return None


def _verify(folder: Path, plan: PlanSpec) -> None:
    file = folder / plan.file
    if Path(plan.file).name != plan.file:
        raise BundleError(
            f"{folder / PLAN_MANIFEST} names a file outside its folder: {plan.file!r}"
        )
    if not file.is_file():
        raise BundleError(f"{file} is missing; compile the target again")
    if (found := sha256_of_file(file)) != plan.sha256:
        raise BundleError(
            f"{file} is corrupted: SHA-256 {found[:12]}..., the manifest says "
            f"{plan.sha256[:12]}...; compile the target again"
        )


def profile_of(component: str, spec: ComponentSpec, manifest: Manifest) -> dict[str, ShapeRange]:
    """Shapes of a component's inputs: sizes from half to one and a half of the model's own."""
    ranges = _axis_ranges(component, manifest)
    return {
        tensor.name: (
            _lengths(tensor.shape, ranges, 0),
            _lengths(tensor.shape, ranges, 1),
            _lengths(tensor.shape, ranges, 2),
        )
        for tensor in spec.inputs
    }


def _axis_ranges(component: str, manifest: Manifest) -> dict[str, tuple[int, int, int]]:
    latents, tokens = manifest.latents, manifest.text.max_tokens
    unit = 1 if component == "vae_encoder" else latents.scale_factor  # pixels per length
    multiple, usual = latents.size_multiple // unit, latents.default_size // unit
    side = (
        max(usual // 2 // multiple * multiple, multiple),
        usual,
        -(-3 * usual // (2 * multiple)) * multiple,
    )
    batch = _BATCH_RANGES.get(component, _BATCH_RANGES["vae"])
    return {
        "batch": batch,
        "rows": batch,
        "tokens": (tokens, tokens, _MAX_CHUNKS * tokens),
        "height": side,
        "width": side,
    }


def _lengths(
    shape: Sequence[int | str], ranges: Mapping[str, tuple[int, int, int]], which: int
) -> list[int]:
    return [ranges[axis][which] if isinstance(axis, str) else axis for axis in shape]


def import_tensorrt_rtx() -> Any:
    """The `tensorrt_rtx` module, or `ProviderUnavailable` that says how to get it."""
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise ProviderUnavailable(
            f"TensorRT for RTX is not installed ({error}); `pip install oneword[rtx]`"
        ) from error
    return tensorrt_rtx


def compile_plan(
    onnx_path: Path,
    plan_path: Path,
    *,
    target: Target,
    spec: ComponentSpec,
    profile: dict[str, ShapeRange],
) -> PlanSpec:
    """Compile one ONNX graph for a target, with no GPU, and write the plan.

    The network is strongly typed: the precision is the graph's. Raises `BundleError` with
    TensorRT's own words if it cannot be parsed or built, or if its tensors are not those of `spec`.
    """
    trt = import_tensorrt_rtx()
    log = _make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, log, onnx_path)
    _check_tensors(trt, network, spec, onnx_path)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(target.capabilities)
    for index, name in enumerate(target.capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    _add_profile(builder, config, profile)
    # Neither REFIT nor STRIP_PLAN: both need a driver, and concepts are inputs, not weights.
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(f"{onnx_path.name} cannot be compiled for {target}: {log.summary()}")
    _write_plan(plan_path, memoryview(plan), onnx_path)
    return PlanSpec(
        file=plan_path.name,
        sha256=sha256_of_file(plan_path),
        sources={path.name: sha256_of_file(path) for path in _sources(onnx_path)},
        inputs=spec.inputs,
        outputs=spec.outputs,
        profile=profile,
    )


def _sources(onnx_path: Path) -> list[Path]:
    data = onnx_path.with_name(f"{onnx_path.name}.data")
    return [onnx_path, data] if data.exists() else [onnx_path]


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps TensorRT's errors for our message, and prints nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def summary(self) -> str:
            return "; ".join(self.errors[:3]) or "TensorRT gave no reason"

    return Logger()


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
    names = {trt.float32: "float32", trt.float16: "float16", trt.int64: "int64"}
    return names.get(dtype, str(dtype))


def _add_profile(builder: Any, config: Any, profile: Mapping[str, ShapeRange]) -> None:
    optimization_profile = builder.create_optimization_profile()
    for name, shapes in profile.items():
        optimization_profile.set_shape(name, *shapes)
    if config.add_optimization_profile(optimization_profile) < 0:
        raise BundleError(f"TensorRT refuses the optimization profile {dict(profile)}")


def _write_plan(path: Path, plan: memoryview, onnx_path: Path) -> None:
    if bytes(plan[: len(_MAGIC)]) != _MAGIC:
        raise BundleError(
            f"the plan of {onnx_path.name} begins with {bytes(plan[:4])!r}, not {_MAGIC!r}"
        )
    path.write_bytes(plan)
