"""Loaded concepts in memory, by the digest of their file."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from engine.concepts import Concept


class ConceptCache:
    """The most recently used concepts, up to a number of bytes; for any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._concepts: OrderedDict[str, Concept] = OrderedDict()

    def get(self, file_sha256: str, load: Callable[[], Concept]) -> Concept:
        """The concept of a file; two that ask at once for one that is not here both load it."""
        with self._lock:
            if file_sha256 in self._concepts:
                self._concepts.move_to_end(file_sha256)
                return self._concepts[file_sha256]
        concept = load()
        with self._lock:
            if file_sha256 not in self._concepts:
                self._concepts[file_sha256] = concept
                self._num_bytes += _size(concept)
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= _size(self._concepts.popitem(last=False)[1])
        return concept


def _size(concept: Concept) -> int:
    vectors = sum(part.nbytes for part in concept.encoders)
    return vectors + sum(len(value) for value in concept.metadata.values())
