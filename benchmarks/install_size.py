"""The runtime without PyTorch: installed size, and an image drawn there.

python -m benchmarks.install_size        (needs a package index)
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.peers import BUNDLE, ROOT

_TOOLS = ("pip", "setuptools", "_distutils_hack", "pkg_resources")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        _run(sys.executable, "-m", "venv", environment)
        python = environment / "bin" / "python"
        _run(python, "-m", "pip", "install", "-q", "-U", "pip")
        # From a copy: an installation leaves a build folder in the source tree.
        _run("git", "clone", "-q", ROOT, Path(folder) / "source")
        constraints = Path(folder) / "source" / "constraints.txt"
        _run(python, "-m", "pip", "install", "-q", "-c", constraints, f"{folder}/source[cpu]")
        (packages,) = environment.glob("lib/python*/site-packages")
        has_torch = (packages / "torch").exists()
        command = environment / "bin" / "oneword"
        picture = Path(folder) / "dog.png"
        _run(command, "generate", "a photo of a dog", "--bundle", BUNDLE, "--output", picture)
        print(f"installed: {_size_mb(packages):.0f} MB, without PyTorch: {not has_torch}")
        print(f"drew {picture.name}: {picture.stat().st_size} bytes")


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


def _size_mb(packages: Path) -> float:
    files = (path for path in packages.rglob("*") if path.is_file())
    counted = (f for f in files if not f.relative_to(packages).parts[0].startswith(_TOOLS))
    return sum(file.stat().st_size for file in counted) / 1e6


if __name__ == "__main__":
    main()
