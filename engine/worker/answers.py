"""What the process of a model says beside arrays: which bundle it has, and what went wrong."""

import hashlib
import traceback
from typing import Any

from engine import errors
from engine.bundle import Manifest
from engine.errors import EngineError

_MAX_CHARACTERS = 4000
# Errors that are told by name; whatever else a model raises is a bug, and comes with its traceback.
_NAMED: dict[str, type[EngineError]] = {
    kind.__name__: kind
    for kind in (
        errors.BundleError,
        errors.ConfigError,
        errors.InvalidRequest,  # a size that no plan takes
        errors.NumericalError,
        errors.ProviderUnavailable,
    )
}


def identity_of(manifest: Manifest) -> str:
    """What two processes compare to know that they have the same bundle open.

    The manifest lists the hash of every file, so its own stands for all of them.
    """
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()


def error_to_body(error: Exception) -> dict[str, str]:
    kind = type(error).__name__
    if _NAMED.get(kind) is type(error):
        return {"kind": kind, "message": str(error)[:_MAX_CHARACTERS]}
    text = "".join(traceback.format_exception(error))
    return {"kind": "", "message": text[-_MAX_CHARACTERS:]}


def error_from_body(body: dict[str, Any]) -> Exception:
    """The error that the other side told of."""
    kind = _NAMED.get(body["kind"])
    if kind is not None:
        return kind(body["message"])
    return RuntimeError(f"the model's process failed:\n{body['message']}")
