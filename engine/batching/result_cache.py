"""Finished images for requests that would draw the same again; off unless given bytes to keep.

Whatever varies between images is an input tensor, so the key of an image is the SHA-256 of those:
the embeddings that go into the text encoders (words, weights and concepts by content), guidance,
the sampler's coefficients, size, initial image, seed; with the identity of the bundle, and with the
tenant, so that the time of an answer tells nobody what others have asked for.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from engine.batching.events import Finished, ImageDone
from engine.batching.jobs import Job
from engine.planner import GenerationPlan
from engine.requests import MAX_SEED, RgbImage


class ResultCache:
    """Images by what determines them; the longest unused go first. Any thread may use it."""

    def __init__(self, max_bytes: int, *, bundle_identity: str) -> None:
        self._max_bytes = max_bytes
        self._identity = bundle_identity.encode()
        self._images: OrderedDict[bytes, RgbImage] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def keys(self, plan: GenerationPlan, tenant: str) -> tuple[bytes, ...]:
        """The key of each image of a request."""
        digest = hashlib.sha256()
        _feed(digest, [self._identity, tenant.encode(), *_determinants(plan)])
        keys = list[bytes]()
        for index in range(plan.request.num_images):
            of_image = digest.copy()
            of_image.update(_seed(plan, index).to_bytes(8, "little"))
            keys.append(of_image.digest())
        return tuple(keys)

    def answer(self, job: Job) -> bool:
        """Tell a request its images and its end, if all of them are here."""
        found = self.find(job.result_keys) if job.result_keys else None
        if found is None:
            return False
        for index, image in enumerate(found):
            seed = _seed(job.plan, index)
            job.emit(ImageDone(image_index=index, seed=seed, image=image))
        job.emit(Finished(timings=job.timings()))
        return True

    def find(self, keys: Sequence[bytes]) -> list[RgbImage] | None:
        """All of these images, or None where one is missing."""
        with self._lock:
            if not all(key in self._images for key in keys):
                return None
            for key in keys:
                self._images.move_to_end(key)
            return [self._images[key] for key in keys]

    def put(self, key: bytes, image: RgbImage) -> None:
        kept = image.copy()  # what came may be a view into a whole batch
        kept.setflags(write=False)
        with self._lock:
            old = self._images.pop(key, None)
            self._images[key] = kept
            self.num_bytes += kept.nbytes - (0 if old is None else old.nbytes)
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= self._images.popitem(last=False)[1].nbytes


def _seed(plan: GenerationPlan, index: int) -> int:
    return (plan.request.seed + index) % (MAX_SEED + 1)


def _determinants(plan: GenerationPlan) -> Iterable[bytes]:
    """Everything but the seed that an image of the request depends on."""
    yield f"{plan.width} {plan.height} {plan.weights} {plan.zero_negative}".encode()
    yield f"{plan.guided_calls.first} {plan.guided_calls.end}".encode()
    yield repr(plan.trajectory).encode()  # of floats: exact
    for texts in plan.texts:
        yield str(len(texts)).encode()
        for text in texts:
            for array in (text.inputs_embeds, text.eos_index, text.weights):
                yield from _array(array)
    if plan.request.init_image is not None:
        yield from _array(plan.request.init_image)


def _array(array: np.ndarray) -> Iterable[bytes]:
    yield f"{array.dtype} {array.shape}".encode()
    yield np.ascontiguousarray(array).tobytes()


def _feed(digest: "hashlib._Hash", parts: Iterable[bytes]) -> None:
    """Each part with its length before it, so that no two lists of parts look the same."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
