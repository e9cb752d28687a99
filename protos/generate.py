"""Make the Python stubs of the API: `python -m protos.generate`, or `--check` to compare only.

protoc runs from the repository root, so that the stubs import each other as
`from protos.oneword.v1 import ...` and nothing has to be rewritten. buf takes protos/ as its root,
which keeps the package `oneword.v1` in a folder of that name. The two agree because no file of the
API imports another one of it; keep it so.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("protos/oneword/v1")
OUTPUTS = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")


def generate(output: Path) -> list[Path]:
    """Write the stubs under `output`; returns their paths relative to it."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).glob("*.proto"))
    plugins = [f"--plugin={name}={_find_plugin(name)}" for name in _plugin_names()]
    outputs = [f"--{name}={output}" for name in OUTPUTS]
    with as_file(files("grpc_tools") / "_proto") as well_known:
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"-I{well_known}"]
        subprocess.run(
            [*command, *plugins, *outputs, *sources], cwd=ROOT, check=True, capture_output=True
        )
    return sorted(path.relative_to(output) for path in (output / PACKAGE).glob("*_pb2*.py*"))


def differences() -> list[str]:
    """What is wrong with the committed stubs, one line each; empty when they are up to date."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        committed = {path.relative_to(ROOT) for path in (ROOT / PACKAGE).glob("*_pb2*.py*")}
        stale = [f"{path} has no .proto" for path in sorted(committed - set(fresh))]
        changed = [
            f"{path} is missing or out of date"
            for path in fresh
            if path not in committed or not filecmp.cmp(ROOT / path, Path(folder, path), False)
        ]
    return stale + changed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the Python stubs of the API.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    if not parser.parse_args(arguments).check:
        generate(ROOT)
        return 0
    found = differences()
    print("\n".join([*found, "run `python -m protos.generate`"] if found else ["up to date"]))
    return 1 if found else 0


def _plugin_names() -> list[str]:
    return ["protoc-gen-mypy", "protoc-gen-mypy_grpc"]


def _find_plugin(name: str) -> str:
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"{name} is missing; install oneword[dev]")
    return found


if __name__ == "__main__":
    sys.exit(main())
