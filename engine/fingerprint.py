"""What says whether a concept fits a model: the hash of its token-embedding table."""

import hashlib

import numpy as np
from jaxtyping import Float


def embedding_fingerprint(table: Float[np.ndarray, "vocab_size dim"]) -> str:
    """SHA-256 (hex) of the table's float32, row-major, little-endian bytes.

    The same weights stored as float16 and as float32 have different fingerprints, unless the
    float32 values are the float16 ones widened.
    """
    return hashlib.sha256(np.ascontiguousarray(table, dtype="<f4").tobytes()).hexdigest()
