"""Signed bundles: the signature of `bundle.json` covers every file, that of `plan.json` its plans.

The manifests hold the SHA-256 of each file, and are signed themselves. Checked are the signatures,
that no file is left out, and the plans; the hashes of the bundle's own files are checked when it is
opened, before any of them is read.
"""

from collections.abc import Sequence
from pathlib import Path

from engine.bundle import MANIFEST, Manifest, read_manifest
from engine.errors import BundleError
from engine.files import sha256_of_file
from engine.plans.manifest import PLAN_MANIFEST, PLANS_FOLDER, read_plan_manifest
from engine.security.signing import SUFFIX, Ed25519PrivateKey, TrustedKeys, sign_file


def check_bundle(path: Path, trusted_keys: Sequence[Path]) -> None:
    """Raise `BundleError` unless a bundle and all its plans are signed by one of the keys.

    Nothing of the bundle is deserialized before its signature was found genuine. Whoever can write
    to the folder can still exchange files after this: it must belong to somebody you trust.
    """
    check_signatures(path, TrustedKeys.read(trusted_keys))


def read_trusted_manifest(path: Path, trusted_keys: Sequence[Path]) -> Manifest:
    """What a bundle says of itself, if it is signed, where keys are given."""
    if trusted_keys:
        check_bundle(path, trusted_keys)
    return read_manifest(path)


def check_signatures(path: Path, trusted: TrustedKeys) -> None:
    """The same for keys that were read."""
    _check_manifest(path / MANIFEST, trusted)
    manifest = read_manifest(path)
    _check_listing(path, {*manifest.files, MANIFEST, MANIFEST + SUFFIX}, besides=PLANS_FOLDER)
    for folder in plan_folders(path):
        _check_manifest(folder / PLAN_MANIFEST, trusted)
        plans = read_plan_manifest(folder, build_key=manifest.build_key)
        files = {plan.file for plan in plans.components.values()}
        _check_listing(folder, {*files, PLAN_MANIFEST, PLAN_MANIFEST + SUFFIX})


def sign_bundle(path: Path, key: Ed25519PrivateKey) -> list[Path]:
    """Sign a bundle and all its plans as they lie there; returns the signatures.

    The files are held against their manifests first: what is damaged is not signed.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        if sha256_of_file(path / name) != expected:
            raise BundleError(f"{path / name} is not what {MANIFEST} lists; build the bundle again")
    folders = plan_folders(path)
    for folder in folders:
        read_plan_manifest(folder, build_key=manifest.build_key)
    return [
        sign_file(path / MANIFEST, key, name=MANIFEST),
        *(sign_file(folder / PLAN_MANIFEST, key, name=PLAN_MANIFEST) for folder in folders),
    ]


def plan_folders(path: Path) -> list[Path]:
    """Folders of a bundle that hold compiled plans."""
    plans = path / PLANS_FOLDER
    return sorted(folder for folder in plans.iterdir() if folder.is_dir()) if plans.is_dir() else []


def _check_manifest(manifest: Path, trusted: TrustedKeys) -> None:
    try:
        content = manifest.read_bytes()
    except OSError as error:
        raise BundleError(f"{manifest} cannot be read: {error.strerror}") from error
    trusted.check(manifest, content, name=manifest.name)


def _check_listing(folder: Path, listed: set[str], *, besides: str = "") -> None:
    """Raise for a file that the signature does not cover: a graph may take its weights from it."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if besides and relative.parts[0] == besides:
            continue
        if not path.is_dir() and relative.as_posix() not in listed:
            raise BundleError(f"{path} is not covered by the signature; remove it")
