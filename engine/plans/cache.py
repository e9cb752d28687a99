"""Plans by content: what is compiled from the same graph in the same way is compiled once."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.files import sha256_of_file, write_atomically
from engine.plans.profiles import Profile
from engine.plans.targets import Target

RECIPE = 1  # of engine/plans/compiler.py: another number where it compiles in another way


def plan_key(
    *,
    sources: Mapping[str, str],
    target: Target,
    library: str,
    flags: Sequence[str],
    profiles: Sequence[Profile],
    precision: Mapping[str, str],
) -> str:
    """SHA-256 over all that decides what a plan is, but not over names.

    `sources` are files -> SHA-256: the graph first, then its weights; `library` is the compiler
    with its full version, `precision` the dtypes of inputs and outputs and of the inside.
    """
    made_of = {
        "recipe": RECIPE,
        "sources": list(sources.values()),
        "target": str(target),
        "library": library,
        "flags": sorted(flags),
        "profiles": list(profiles),
        "precision": dict(precision),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


class PlanCache:
    """A folder of plans named by their keys: `KEY.plan`, and its SHA-256 in `KEY.sha256`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, key: str, to: Path) -> bool:
        """Copy a plan to its place, if there is a sound one; a damaged one is removed."""
        plan, note = self._files(key)
        if not plan.is_file() or not note.is_file():
            return False
        shutil.copyfile(plan, to)
        if sha256_of_file(to) == note.read_text(encoding="ascii", errors="replace").strip():
            return True
        to.unlink()
        for file in (note, plan):
            file.unlink(missing_ok=True)
        return False

    def keep(self, key: str, plan: Path) -> None:
        """Put a plan into the cache, whole or not at all."""
        kept, note = self._files(key)
        kept.parent.mkdir(parents=True, exist_ok=True)
        staged = kept.with_name(f".{kept.name}.{os.getpid()}")
        try:
            shutil.copyfile(plan, staged)
            os.replace(staged, kept)
        finally:
            staged.unlink(missing_ok=True)
        write_atomically(note, sha256_of_file(plan).encode())

    def _files(self, key: str) -> tuple[Path, Path]:
        return self._folder / f"{key}.plan", self._folder / f"{key}.sha256"
