"""Words that were packed with a model: files of the bundle, which every caller can name.

`oneword pack` puts them into `concepts/`, and lists them in `bundle.json`: they are hashed and
signed like the graphs.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath

from engine.bundle import CONCEPTS_FOLDER, Bundle
from engine.concepts import Concept, check_fits, read_concept
from engine.errors import BundleError, ConceptMismatch, InvalidRequest


def packed_concept_files(files: Mapping[str, str]) -> list[str]:
    """Those of a manifest's files that are packed words."""
    return sorted(name for name in files if PurePosixPath(name).parts[0] == CONCEPTS_FOLDER)


def read_packed_concepts(bundle: Bundle) -> dict[str, Concept]:
    """The words of a bundle by placeholder token; raises `BundleError` that names the file."""
    manifest = bundle.manifest
    found: dict[str, Concept] = {}
    for name in packed_concept_files(manifest.files):
        try:
            concept = read_concept(bundle.path / name)
            check_fits(
                concept,
                manifest.text,
                text_2=manifest.text_2,
                model_name=manifest.model_name,
            )
        except (InvalidRequest, ConceptMismatch) as error:
            raise BundleError(f"{bundle.path / name}: {error}; pack the bundle again") from error
        if concept.placeholder_token in found:
            raise BundleError(
                f"{bundle.path}: two packed concepts are called {concept.placeholder_token!r}; "
                "pack the bundle again"
            )
        found[concept.placeholder_token] = concept
    return found
