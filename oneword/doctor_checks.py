"""What `oneword doctor` looks at: each check says what it found, and what would mend it."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.backends.cuda_device import Gpu, find_gpu
from engine.backends.names import BACKENDS
from engine.bundle import Bundle
from engine.errors import BundleError, OneWordError, ProviderUnavailable
from engine.plans.manifest import PLANS_FOLDER, read_plan_manifest
from engine.plans.selection import check_capability, check_library, targets_of
from engine.plans.targets import CAPABILITIES, Target
from engine.plans.tensorrt_module import TITLES, import_tensorrt
from engine.sessions import check_onnxruntime_install, usable_cores

OK, MISSING, BROKEN = "ok", "missing", "broken"
# What the report names the versions of; nothing else of the environment is in it.
PACKAGES = (
    "oneword",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "openvino",
    "tokenizers",
    "safetensors",
    "grpcio",
    "protobuf",
    "cuda-bindings",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
    "torch",
    "diffusers",
    "transformers",
)
_SMI_FIELDS = ("name", "compute_cap", "driver_version", "memory.total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `missing` is what this machine simply has not got."""

    name: str
    state: str  # OK, MISSING or BROKEN
    says: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


def machine() -> Finding:
    """The system, without its name or that of anybody on it."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "usable_cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
    }
    memory = "" if facts["memory_bytes"] is None else f", {facts['memory_bytes'] / 2**30:.0f} GiB"
    says = f"Python {facts['python']}, {facts['system']} {facts['machine']}, " + (
        f"{facts['usable_cores']} usable cores{memory}"
    )
    return Finding(name="machine", state=OK, says=says, facts=facts)


def packages() -> Finding:
    """Versions, and what cannot be installed together."""
    found: dict[str, list[str]] = {
        name: sorted({one.version for one in importlib.metadata.distributions(name=name)})
        for name in PACKAGES
    }
    versions = {name: ", ".join(several) for name, several in found.items() if several}
    says = ", ".join(f"{name} {version}" for name, version in versions.items())
    try:
        check_onnxruntime_install()
    except ProviderUnavailable as error:
        return Finding(
            name="packages", state=BROKEN, says=f"{error} (installed: {says})", facts=versions
        )
    if several := [name for name, many in found.items() if len(many) > 1]:
        return Finding(
            name="packages",
            state=BROKEN,
            says=f"installed in more than one version: {', '.join(several)}",
            remedy="make a new virtual environment",
            facts=versions,
        )
    return Finding(name="packages", state=OK, says=says, facts=versions)


def driver() -> Finding:
    """What NVIDIA's own tool says, which needs no package of ours."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding(
            name="driver",
            state=MISSING,
            says="nvidia-smi is not there, so probably no NVIDIA driver is installed",
            remedy="for a GPU, install NVIDIA's driver, version 580 or newer; the CPU needs none",
        )
    query = [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stdout", None) or str(error)
        return Finding(
            name="driver",
            state=BROKEN,
            says=f"nvidia-smi fails: {one_line(reason)}",
            remedy="install NVIDIA's driver again, and load its module (a reboot does)",
        )
    gpus = [
        dict(zip(_SMI_FIELDS, row.split(", "), strict=False)) for row in done.stdout.splitlines()
    ]
    says = "; ".join(f"{g.get('name')} (driver {g.get('driver_version')})" for g in gpus)
    return Finding(name="driver", state=OK, says=says or "no GPU is listed", facts={"gpus": gpus})


def gpu() -> tuple[Finding, Gpu | None]:
    """The GPU as backends see it, through CUDA's own bindings."""
    try:
        found = find_gpu()
    except OneWordError as error:
        return Finding(name="gpu", state=MISSING, says=one_line(error)), None
    says = (
        f"{found.name}, {found.capability}, {found.memory_bytes / 2**30:.0f} GiB, driver for CUDA "
        f"{found.driver_version // 1000}.{found.driver_version % 1000 // 10}"
    )
    facts = {
        "name": found.name,
        "capability": found.capability,
        "memory_bytes": found.memory_bytes,
        "driver_cuda_version": found.driver_version,
    }
    return Finding(name="gpu", state=OK, says=says, facts=facts), found


def compilers() -> Iterator[Finding]:
    """A small graph compiled for each capability, and by TensorRT for the GPU that is here."""
    from oneword.doctor_graph import compile_small_graph

    for kind, targets in (
        ("rtx", [f"rtx:{capability}" for capability in CAPABILITIES]),
        ("trt", ["trt:native"]),
    ):
        name = f"compiler {kind}"
        title = TITLES["rtx" if kind == "rtx" else "trt"]
        try:
            version = str(import_tensorrt("rtx" if kind == "rtx" else "trt").__version__)
        except OneWordError as error:
            yield Finding(name=name, state=MISSING, says=one_line(error))
            continue
        for text in targets:
            started = time.perf_counter()
            try:
                target = Target.parse(text)
                if target.is_native:
                    target = Target((find_gpu().capability,), "trt")
                with tempfile.TemporaryDirectory() as folder:
                    nbytes = compile_small_graph(Path(folder), target)
            except OneWordError as error:
                state = MISSING if isinstance(error, ProviderUnavailable) else BROKEN
                yield Finding(name=f"{name} {text}", state=state, says=one_line(error))
                continue
            seconds = time.perf_counter() - started
            yield Finding(
                name=f"{name} {text}",
                state=OK,
                says=f"{title} {version} compiles a small graph for {target} in {seconds:.1f} s",
                facts={"seconds": round(seconds, 3), "plan_bytes": nbytes, "version": version},
            )


def bundle(path: Path) -> tuple[Finding, Bundle | None]:
    """Every file against its hash, every shape against the manifest."""
    try:
        opened = Bundle.open(path)
    except (OneWordError, OSError) as error:
        return Finding(name="bundle", state=BROKEN, says=one_line(error, path)), None
    manifest = opened.manifest
    facts: dict[str, Any] = {
        "family": manifest.family,
        "precision": manifest.precision,
        "default_size": manifest.latents.default_size,
        "build_key": manifest.build_key,
        "bytes": sum((path / name).stat().st_size for name in manifest.files),
    }
    says = (
        f"all {len(manifest.files)} files are sound: {manifest.family}, {manifest.precision}, "
        f"{manifest.latents.default_size} pixels, {facts['bytes'] / 1e6:,.0f} MB"
    )
    return Finding(name="bundle", state=OK, says=says, facts=facts), opened


def plans(opened: Bundle, gpu: Gpu | None) -> Iterator[Finding]:
    """Every target that the bundle has plans for, against this machine."""
    targets = targets_of(opened.path)
    if not targets:
        yield Finding(
            name="plans",
            state=MISSING,
            says="the bundle has no compiled plans",
            remedy="backends rtx and tensorrt need them: build_engines.py --target rtx:SM or "
            "--target trt:native",
        )
    for target in targets:
        folder = opened.path / PLANS_FOLDER / target.folder
        name = f"plans {target}"
        try:
            manifest = read_plan_manifest(folder, build_key=opened.manifest.build_key)
        except OneWordError as error:
            yield Finding(name=name, state=BROKEN, says=one_line(error, opened.path))
            continue
        whole = f"all {len(manifest.components)} plans are sound, for {', '.join(manifest.buckets)}"
        try:
            version = str(import_tensorrt(target.kind).__version__)
            check_library(manifest, folder, kind=target.kind, library_version=version)
            if gpu is None:
                raise ProviderUnavailable("there is no GPU here to run them")
            check_capability(target.kind, gpu.capability)
            if gpu.capability not in target.capabilities:
                raise ProviderUnavailable(f"this GPU is {gpu.capability}")
        except OneWordError as error:
            stale = isinstance(error, BundleError)
            yield Finding(
                name=name,
                state=BROKEN if stale else MISSING,
                says=f"{whole}; {one_line(error, opened.path)}",
            )
            continue
        yield Finding(name=name, state=OK, says=f"{whole}, and are for this machine's GPU")


def backends(path: Path, draw: Callable[[Path, str], float]) -> Iterator[Finding]:
    """Every backend on a real call: text, denoiser, sampler's step and decoder."""
    for backend in BACKENDS:
        try:
            seconds = draw(path, backend)
        except ProviderUnavailable as error:
            yield Finding(name=f"backend {backend}", state=MISSING, says=one_line(error, path))
        except Exception as error:  # whatever a backend does, the others have their turn
            kind = "" if isinstance(error, OneWordError) else f"{type(error).__name__}: "
            yield Finding(
                name=f"backend {backend}",
                state=BROKEN,
                says=f"{kind}{one_line(error, path)}",
                remedy="send us this report",
            )
        else:
            says = f"draws an image in {seconds:.1f} s, with loading"
            yield Finding(
                name=f"backend {backend}",
                state=OK,
                says=says,
                facts={"seconds": round(seconds, 3)},
            )


def one_line(error: object, *folders: Path) -> str:
    """An error as one line, without folders: those may hold names."""
    text = " ".join(str(error).split())
    for folder in folders:
        for spelled in {str(folder), str(folder.resolve())}:
            text = text.replace(spelled, "BUNDLE")
    return without_paths(text)


def without_paths(text: str) -> str:
    """Absolute paths shortened to their last part."""
    home = os.path.expanduser("~")
    text = text.replace(home, "~") if len(home) > 1 else text
    return re.sub(r"(?<![\w.:/])~?(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
