"""What a packed bundle needs of Python: the runtime's packages in the versions installed here."""

import importlib.metadata
from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engine.errors import ConfigError
from engine.sessions import check_onnxruntime_install

_ROOT = "oneword"
_COMPILERS = {"rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt-cu13"}  # by extra
_NEVER = ("torch", "diffusers", "transformers")


def runtime_requirements(*, signed: bool, plans: Sequence[str]) -> str:
    """A requirements file with every package that the runtime needs, each in one exact version.

    `plans` are the folders of the plans that are packed. Raises `ProviderUnavailable` where ONNX
    Runtime is missing or installed twice, `ConfigError` where another package is missing.
    """
    check_onnxruntime_install()
    runtime = "gpu" if _is_installed("onnxruntime-gpu") else "cpu"
    version = importlib.metadata.version(_ROOT)
    lines = [
        f"# What OneWord {version} needs to serve this bundle, as it was installed where this was",
        "# packed. OneWord itself goes beside it, without its dependencies:",
        f"#     pip install -r requirements.txt && pip install --no-deps oneword-{version}-*.whl",
    ]
    roots = [f"{_ROOT}[{runtime}]"]
    if signed:
        roots.append("cryptography")
    for extra in sorted({_extra_of(plan) for plan in plans}):
        library = _COMPILERS[extra]
        if _is_installed(library):
            roots.append(f"{_ROOT}[{extra}]")
        else:
            lines.append(f"# The plans need {library}, which was not installed there.")
    names = closure(roots)
    return "\n".join([*lines, *(f"{n}=={importlib.metadata.version(n)}" for n in names), ""])


def closure(roots: Sequence[str], *, refused: Sequence[str] = _NEVER) -> list[str]:
    """These packages and all that they need here, by name; without OneWord.

    Raises `ConfigError` for one that is refused, or not installed.
    """
    waiting = [Requirement(root) for root in roots]
    seen: set[str] = set()
    found: set[str] = set()
    while waiting:
        one = waiting.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        name = canonicalize_name(one.name)
        if name in refused:
            raise ConfigError(f"{name} is needed by a package that the runtime cannot do without")
        found.add(name)
        waiting += _needed(name, one.extras)
    return sorted(found - {_ROOT})


def _needed(name: str, extras: set[str]) -> Iterator[Requirement]:
    """What a package itself asks for on this machine."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"{name} is not installed, and the packed bundle would need it; install it, so that "
            "its version is known"
        ) from error
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def _extra_of(plan: str) -> str:
    return "rtx" if plan.startswith("rtx") else "tensorrt"


def _is_installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))
