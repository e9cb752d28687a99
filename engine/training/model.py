"""The model that words are learned on: whether this server can learn, without importing PyTorch."""

import importlib.util
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from engine.bundle import Manifest
from engine.concepts import widened_bfloat16
from engine.errors import TrainingUnavailable
from engine.fingerprint import embedding_fingerprint

PACKAGES = ("torch", "diffusers", "transformers")
# transformers before 5.6 writes `text_model.` before it.
_TABLE = "embeddings.token_embedding.weight"
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MAX_HEADER_BYTES = 64 << 20


class TrainableModel:
    """A diffusers folder that must have the token embeddings of the bundle that is served."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._wanted = {"text_encoder": manifest.text.embedding_fingerprint}
        if manifest.text_2 is not None:
            self._wanted["text_encoder_2"] = manifest.text_2.embedding_fingerprint
        self._bundle_name = manifest.model_name
        self._found: dict[str, str] = {}  # fingerprints, once they are known

    def check(self) -> None:
        """Raise `TrainingUnavailable` unless words can be learned here; reads the model once."""
        if missing := [name for name in PACKAGES if not _is_installed(name)]:
            raise TrainingUnavailable(
                f"this server cannot learn: {', '.join(missing)} is not installed beside it; "
                "install it with: pip install 'oneword[train]'"
            )
        if not (self.path / "model_index.json").is_file():
            raise TrainingUnavailable(
                "this server cannot learn: its training model is not a diffusers folder (it has no "
                "model_index.json); start it with --training-model DIFFUSERS_DIR"
            )
        for part, wanted in self._wanted.items():
            found = self._found.get(part) or read_fingerprint(self.path / part)
            self._found[part] = found
            if found != wanted:
                raise TrainingUnavailable(
                    f"this server cannot learn: the {part} of its training model has the embedding "
                    f"fingerprint {found[:12]}..., the bundle of {self._bundle_name!r} has "
                    f"{wanted[:12]}..., so its words would not fit; start it with the model that "
                    "the bundle was built from as --training-model"
                )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # something keeps it from being imported
        return False


def read_fingerprint(text_encoder: Path) -> str:
    """The embedding fingerprint of a text encoder's folder; raises `TrainingUnavailable`."""
    for path in _weight_files(text_encoder):
        try:
            table = _read_table(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingUnavailable(
                f"this server cannot learn: {text_encoder.name}/{path.name} of its training model "
                "is not a readable safetensors file; save the model anew"
            ) from error
        if table is not None:
            return embedding_fingerprint(table)
    raise TrainingUnavailable(
        f"this server cannot learn: the folder {text_encoder.name} of its training model holds no "
        "token embeddings in a safetensors file; save the model with `pipeline.save_pretrained`"
    )


def _weight_files(folder: Path) -> list[Path]:
    """The plain weights; where there are none, those of the fp16 variant."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if ".fp16" not in path.name]
    return plain or files


def _read_table(path: Path) -> Float32[np.ndarray, "vocab_size dim"] | None:
    """The token embeddings in a safetensors file; None where they are in another one."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        length = int.from_bytes(content[:8], "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        header: dict[str, Any] = json.loads(content[8 : 8 + length])
        name = next((name for name in header if name.endswith(_TABLE)), None)
        if name is None:
            return None
        begin, end = header[name]["data_offsets"]
        data = content[8 + length + begin : 8 + length + end]
        table = np.frombuffer(data, _DTYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
    return widened_bfloat16(table) if table.dtype == np.uint16 else table.astype(np.float32)
