"""Environments of their own for systems that do not live beside this project's packages."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# optimum-onnx holds transformers below 4.58; the runtime wants none of that.
PACKAGES: dict[str, tuple[str, ...]] = {
    "optimum-onnx": ("optimum-onnx[onnxruntime]", "diffusers<1", "accelerate", "torch=="),
}


class MissingSystem(Exception):
    """A system that cannot be had here, and why."""


def python_of(environment: str | None, cache: Path) -> Path:
    """The interpreter of an environment, made with pip if it is not there; ours for None."""
    if environment is None:
        return Path(sys.executable)
    folder = cache / "venvs" / environment
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", "pip"])
        packages = [
            f"torch=={_torch()}" if one == "torch==" else one for one in PACKAGES[environment]
        ]
        _run([str(python), "-m", "pip", "install", "--quiet", *packages])
        (folder / "complete").touch()
    return python


def versions_of(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """The versions that an environment has of packages, those that it lacks left out."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.name.lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    import json

    done = subprocess.run(
        [str(python), "-c", code, *packages], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _torch() -> str:
    return version("torch").partition("+")[0]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise MissingSystem(f"{' '.join(command[1:4])}: {words[-1]}")
