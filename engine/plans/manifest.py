"""`plan.json`: what a folder of plans is, checked before anything in it is deserialized.

A plan is code: take it from whom you trust (docs/security.md has signatures).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle import TensorSpec
from engine.errors import BundleError, ProviderUnavailable
from engine.files import sha256_of_file
from engine.plans.profiles import Profile
from engine.plans.targets import Target

FORMAT_VERSION = 3
PLAN_MANIFEST = "plan.json"
PLANS_FOLDER = "plans"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """One compiled graph."""

    file: str
    sha256: str
    key: str  # SHA-256 of all that decides what is compiled (engine/plans/cache.py)
    sources: dict[str, str]  # the ONNX file it was compiled from, and its weights -> SHA-256
    precision: str  # of the graph: "fp16", or "fp32" where it overflows in float16
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    profiles: list[Profile]  # one for each resolution bucket, in the order of the plan's own


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanManifest:
    """`plan.json`, field for field."""

    format_version: int
    target: str
    library: str  # "tensorrt_rtx" or "tensorrt"
    library_version: str
    buckets: list[str]
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
    profiles: list[Profile] = [
        {name: (list(low), list(usual), list(high)) for name, (low, usual, high) in one.items()}
        for one in fields["profiles"]
    ]
    converted: dict[str, Any] = {**fields, **tensors, "profiles": profiles}
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
