"""Processes without PyTorch, and without a network where the system can take it away."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCKED = ("torch", "diffusers", "transformers")
_SITE = f"""
import socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked by the test")

sys.meta_path.insert(0, Blocked())

def connect(self, address, *, _connect=socket.socket.connect):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        raise OSError(f"the test allows no connection to {{address}}")
    return _connect(self, address)

socket.socket.connect = connect
"""


def isolated_command(*words: object) -> list[str]:
    """A Python command; in a network of its own, which has nothing, where that can be had."""
    prefix: list[str] = []
    if unshare := shutil.which("unshare"):
        alone = [unshare, "--map-root-user", "--net"]
        if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0:
            prefix = alone
    return [*prefix, sys.executable, *map(str, words)]


def isolated_environment(folder: Path) -> Mapping[str, str]:
    """An environment in which Python and its children refuse PyTorch and sockets to outside."""
    (folder / "sitecustomize.py").write_text(_SITE)
    path = os.pathsep.join((str(folder), str(ROOT)))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "0"}
