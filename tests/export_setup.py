"""Bundles of a tiny model: built, read and broken."""

import hashlib
import json
from pathlib import Path
from typing import Any

from trainer.export import BuildReport, build_bundle


def build(model: Path, output: Path, **options: Any) -> BuildReport:
    """A bundle with one sampler of few steps: the tables have tests of their own."""
    return build_bundle(model, output, samplers=["ddim"], max_steps=8, **options)


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
