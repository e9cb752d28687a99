"""What may stand where a bundle is written."""

from pathlib import Path

from engine.bundle import MANIFEST, Bundle
from engine.errors import BundleError


def obstacle(output: Path) -> str | None:
    """What stands where a bundle is to be and is none, in words; None where there is room."""
    if not output.exists() or (output / MANIFEST).is_file():
        return None
    if output.is_dir() and not any(output.iterdir()):
        return None
    kind = "a folder that is not a bundle" if output.is_dir() else "a file"
    return f"{output} is {kind}; it is not overwritten: choose another --output"


def is_built(output: Path, build_key: str) -> bool:
    """Whether a sound bundle of this build stands there."""
    try:
        return Bundle.open(output).manifest.build_key == build_key
    except BundleError:
        return False
