"""From a bundle to what goes out to a device: copied, rounded, completed, checked and signed."""

import hashlib
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float, Float16
from safetensors.numpy import save

from engine.bundle import (
    CONCEPTS_FOLDER,
    MANIFEST,
    TOKEN_EMBEDDING,
    TOKEN_EMBEDDING_2,
    Bundle,
    Manifest,
)
from engine.concepts import Concept, check_fits, concept_to_bytes
from engine.errors import BundleError, InvalidRequest
from engine.files import is_full, sha256_of_file, sync_path
from engine.packed import packed_concept_files, read_packed_concepts
from engine.plans.manifest import PLAN_MANIFEST, read_plan_manifest
from engine.security.bundle_signatures import (
    check_bundle,
    check_signatures,
    plan_folders,
    sign_bundle,
)
from engine.security.signing import Ed25519PrivateKey, TrustedKeys, key_id
from engine.staging import locked_folder, remove_abandoned, staged_folder

REQUIREMENTS = "requirements.txt"
ARCHIVES = (".tar", ".zip")
_TABLES = (TOKEN_EMBEDDING, TOKEN_EMBEDDING_2)
_MODE = 0o644
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # of a zip file: archives of the same content are the same

MakeRequirements = Callable[[Sequence[str]], str]  # told the names of the plans


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What `pack_bundle` put where."""

    path: Path
    concepts: tuple[Concept, ...]
    plans: tuple[str, ...]
    rounding: dict[str, float]  # table -> largest error by float16, of the largest value
    num_bytes: int


def pack_bundle(
    source: Path,
    output: Path,
    *,
    requirements: MakeRequirements,
    concepts: Sequence[Concept] = (),
    plans: Sequence[str] | None = None,  # folders of plans/; None: all that there are
    key: Ed25519PrivateKey | None = None,
    trusted_keys: Sequence[Path] = (),  # of which one must have signed the source
) -> PackReport:
    """Write a packed bundle to `output`: a folder, or one file where it ends in .tar or .zip.

    It is there as a whole or not at all, and what is there already is left alone. Raises
    `BundleError`, `InvalidRequest`, `ConceptMismatch`, or an `OSError` that names `output`.
    """
    source, output = source.resolve(), output.resolve()
    _check_output(source, output)
    if trusted_keys:
        check_bundle(source, trusted_keys)
    bundle = Bundle.open(source)
    words = _all_concepts(bundle, concepts)
    chosen = _chosen_plans(source, plans)
    rounding: dict[str, float] = {}
    with _destination(output) as folder:
        manifest = replace(bundle.manifest, files=_write_files(bundle, folder, words, rounding))
        _write(folder / REQUIREMENTS, requirements([one.name for one in chosen]).encode())
        manifest.files[REQUIREMENTS] = sha256_of_file(folder / REQUIREMENTS)
        _write(folder / MANIFEST, manifest.to_json().encode())
        for plan_folder in chosen:
            _copy_plans(plan_folder, folder / plan_folder.relative_to(source), manifest)
        _sign_and_check(folder, key)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return PackReport(
        path=output,
        concepts=tuple(words),
        plans=tuple(folder.name for folder in chosen),
        rounding=rounding,
        num_bytes=num_bytes,
    )


def _check_output(source: Path, output: Path) -> None:
    if output.exists():
        raise BundleError(f"{output} is there already; remove it, or name another --output")
    if source in output.parents:
        raise BundleError(f"{output} lies in the bundle that is packed; name another --output")


def _all_concepts(bundle: Bundle, concepts: Sequence[Concept]) -> list[Concept]:
    """Those that were packed before and the new ones, each once, in the order of their tokens."""
    manifest = bundle.manifest
    found = read_packed_concepts(bundle)
    for concept in concepts:
        check_fits(concept, manifest.text, text_2=manifest.text_2, model_name=manifest.model_name)
        other = found.setdefault(concept.placeholder_token, concept)
        if other.concept_id != concept.concept_id:
            raise InvalidRequest(
                f"two different concepts are called {concept.placeholder_token!r} "
                f"({other.concept_id[:12]}... and {concept.concept_id[:12]}...); rename one with "
                "`oneword concepts export --placeholder-token NAME`",
                field="concepts",
            )
    return [found[token] for token in sorted(found)]


def _chosen_plans(source: Path, names: Sequence[str] | None) -> list[Path]:
    there = {folder.name: folder for folder in plan_folders(source)}
    if names is None:
        return list(there.values())
    if unknown := [name for name in names if name not in there]:
        raise BundleError(
            f"{source} has no plans {', '.join(map(repr, unknown))}; there: "
            f"{', '.join(there) or 'none'}; compile them with build_engines.py --target"
        )
    return [there[name] for name in dict.fromkeys(names)]


def _write_files(
    bundle: Bundle, folder: Path, words: Sequence[Concept], rounding: dict[str, float]
) -> dict[str, str]:
    """Fill a folder with all but the manifest; returns the SHA-256 of each file."""
    files: dict[str, str] = {}
    left_out = {REQUIREMENTS, *packed_concept_files(bundle.manifest.files)}
    for name, expected in bundle.manifest.files.items():
        if name in left_out or name in _TABLES:
            continue
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        _copy(bundle.path / name, copy)
        files[name] = sha256_of_file(copy)
        if files[name] != expected:
            raise BundleError(f"{bundle.path / name} changed while it was packed; pack it again")
    for name, vocabulary in zip(_TABLES, bundle.vocabularies, strict=False):
        table, rounding[name] = to_float16(vocabulary.token_embedding, name)
        _write(folder / name, save({"token_embedding": table}))
        files[name] = sha256_of_file(folder / name)
    for concept in words:
        content = concept_to_bytes(concept)
        # Named by content: a placeholder token may be no file name, or that of another file.
        name = f"{CONCEPTS_FOLDER}/{hashlib.sha256(content).hexdigest()}.safetensors"
        _write(folder / name, content)
        files[name] = sha256_of_file(folder / name)
    return files


def to_float16(
    table: Float[np.ndarray, "vocab_size dim"], name: str
) -> tuple[Float16[np.ndarray, "vocab_size dim"], float]:
    """A table rounded to float16, and the largest error over its largest magnitude.

    Raises `BundleError` for values that float16 cannot hold.
    """
    with np.errstate(over="ignore"):
        half = table.astype(np.float16)
    if not np.isfinite(half).all():
        raise BundleError(
            f"{name} has values up to {np.abs(table).max():g}, float16 holds {65504:g} at most; "
            "this model cannot be packed, serve its bundle as it is"
        )
    error = np.abs(half.astype(np.float32) - table).max(initial=0.0)
    return half, float(error / max(np.abs(table).max(initial=0.0), 1e-30))


def _copy_plans(source: Path, folder: Path, manifest: Manifest) -> None:
    plans = read_plan_manifest(source, build_key=manifest.build_key)
    folder.mkdir(parents=True)
    for name in (PLAN_MANIFEST, *(plan.file for plan in plans.components.values())):
        _copy(source / name, folder / name)


def _sign_and_check(folder: Path, key: Ed25519PrivateKey | None) -> None:
    """What goes out is opened once as the device will open it."""
    if key is not None:
        sign_bundle(folder, key)
        public = key.public_key()
        check_signatures(folder, TrustedKeys({key_id(public): public}))
    opened = Bundle.open(folder)
    read_packed_concepts(opened)
    for plans in plan_folders(folder):
        read_plan_manifest(plans, build_key=opened.manifest.build_key)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if is_full(error):  # which is about the target alone
            raise type(error)(error.errno, error.strerror, str(target)) from error
        raise


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


@contextmanager
def _destination(output: Path) -> Generator[Path]:
    """A folder to fill that becomes `output`, as it is or as an archive, if the block ends well."""
    if output.suffix.lower() not in ARCHIVES:
        with staged_folder(output) as folder:
            yield folder
        return
    try:
        remove_abandoned(output)
        with locked_folder(output, "building") as work:
            folder = work / "content" / output.stem
            folder.mkdir(parents=True)
            yield folder
            archive = work / f"archive{output.suffix.lower()}"
            _write_archive(folder, archive)
            archive.chmod(_MODE)
            sync_path(archive)
            os.replace(archive, output)
            sync_path(output.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(output)) from error


def _write_archive(folder: Path, archive: Path) -> None:
    """The same content gives the same bytes. The manifest comes last: half an archive has none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: path == folder / MANIFEST)
    names = [str(PurePosixPath(path.relative_to(folder.parent))) for path in files]
    if archive.suffix == ".tar":
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            for path, name in zip(files, names, strict=True):
                info = tarfile.TarInfo(name)
                info.size, info.mode = path.stat().st_size, _MODE
                with path.open("rb") as content:
                    tar.addfile(info, content)
        return
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for path, name in zip(files, names, strict=True):
            entry = zipfile.ZipInfo(name, _EARLIEST)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, _MODE << 16
            with path.open("rb") as content, packed.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(content, target, 1 << 20)
