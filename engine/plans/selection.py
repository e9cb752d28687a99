"""Which of a bundle's plans run on a machine; all of it is decided before anything is opened."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BundleError, ProviderUnavailable
from engine.plans.manifest import PLANS_FOLDER, PlanManifest, read_plan_manifest
from engine.plans.targets import CAPABILITIES, Target
from engine.plans.tensorrt_module import MODULES, TITLES, Kind


@dataclass(frozen=True, slots=True)
class Plans:
    """Plans that were verified, and where they are."""

    folder: Path
    manifest: PlanManifest


def targets_of(bundle: Path) -> list[Target]:
    """The targets that a bundle has folders of plans for; what they hold is not looked at."""
    folder = bundle / PLANS_FOLDER
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    found: list[Target] = []
    for name in names:
        kind, _, capabilities = name.partition("-")
        try:
            found.append(Target.parse(f"{kind}:{capabilities.replace('-', ',')}"))
        except ProviderUnavailable:
            continue  # not one of ours
    return found


def check_capability(kind: Kind, capability: str) -> None:
    """Raise `ProviderUnavailable` for a GPU that a kind of plan cannot be for."""
    if kind == "rtx" and capability not in CAPABILITIES:
        hopper = "; use --backend tensorrt or cuda" if capability == "sm90" else ""
        raise ProviderUnavailable(
            f"TensorRT for RTX compiles for {', '.join(CAPABILITIES)}, this GPU is {capability}"
            f"{hopper}"
        )


def select_plans(
    bundle: Path,
    *,
    build_key: str,
    kind: Kind,
    capability: str,
    library_version: str,
    components: Collection[str] = (),
) -> Plans:
    """The plans of a bundle for a GPU, verified, with at least these components.

    Raises `ProviderUnavailable` where there are none for it, and `BundleError` where they are
    damaged, of another build, or of a library that this one cannot stand in for.
    """
    check_capability(kind, capability)
    targets = [target for target in targets_of(bundle) if target.kind == kind]
    fitting = [target for target in targets if capability in target.capabilities]
    if not fitting:
        have = ", ".join(map(str, targets)) or "none"
        raise ProviderUnavailable(
            f"the bundle has no plans of {TITLES[kind]} for {capability} (it has {have}); compile "
            f"them with build_engines.py --target {kind}:{capability}"
        )
    # What was compiled for the fewest capabilities was compiled for this one most of all.
    target = min(fitting, key=lambda one: len(one.capabilities))
    folder = bundle / PLANS_FOLDER / target.folder
    manifest = read_plan_manifest(folder, build_key=build_key)
    check_library(manifest, folder, kind=kind, library_version=library_version)
    if missing := sorted(set(components) - manifest.components.keys()):
        raise BundleError(
            f"the plans at {folder} lack {', '.join(missing)}; compile the target again"
        )
    return Plans(folder, manifest)


def check_library(
    manifest: PlanManifest, folder: Path, *, kind: Kind, library_version: str
) -> None:
    """Raise `BundleError` for plans of another library, or of a version that this one cannot read.

    A plan of TensorRT is for the version that compiled it. One of TensorRT for RTX may be opened by
    a later version, which has the last word on it (`get_engine_validity`).
    """
    ours, theirs = f"{MODULES[kind]} {library_version}", manifest.library_version
    newer = kind == "rtx" and _numbers(library_version) >= _numbers(theirs)
    if manifest.library != MODULES[kind] or not (newer or library_version == theirs):
        raise BundleError(
            f"the plans at {folder} were compiled by {manifest.library} {theirs}, this machine has "
            f"{ours}; install that version, or compile the target again"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
