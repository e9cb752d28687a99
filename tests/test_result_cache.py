"""The result cache: what shares an image, what must not, its limit; the batcher in front of it."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from engine.batching.events import Finished, ImageDone
from engine.batching.result_cache import ResultCache
from engine.concepts import Concept
from engine.pipeline import Pipeline
from engine.planner import GenerationPlan
from engine.requests import MAX_SEED, GenerationRequest
from tests.batcher_toy import Rig, plan
from tests.fakes import DIM, FakeDenoiser, make_pipeline

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def toy_pipeline() -> Pipeline:
    return make_pipeline(FakeDenoiser())


def concept(value: float, token: str = "<x>") -> Concept:
    vectors = np.full((2, DIM), value, np.float32)
    return Concept(placeholder_token=token, learned_embeddings=vectors)


BASE: dict[str, Any] = {
    "prompt": "a photo of <x>",
    "concepts": (concept(0.5),),
    "num_inference_steps": 10,
    "init_image": PIXELS,
}
CHANGES: list[dict[str, Any]] = [
    {"prompt": "a photo of a <x>"},
    {"prompt": "a (photo:1.2) of <x>"},
    {"negative_prompt": "blurry"},
    {"concepts": (concept(0.25),)},
    {"seed": 1},
    {"num_inference_steps": 20},
    {"guidance_scale": 7.0},
    {"guidance_scale": 1.0},
    {"strength": 0.5},
    {"init_image": None},
    {"init_image": PIXELS[::-1].copy()},
    {"width": 128},
    {"width": 128, "height": 32},
]


def key(pipeline: Pipeline, tenant: str = "a", **fields: Any) -> bytes:
    cache = ResultCache(1 << 20, bundle_identity="bundle")
    return cache.keys(pipeline.plan(GenerationRequest(**{**BASE, **fields})), tenant)[0]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: " ".join(change))
def test_whatever_changes_an_image_changes_its_key(
    toy_pipeline: Pipeline, change: dict[str, Any]
) -> None:
    assert key(toy_pipeline, **change) != key(toy_pipeline)


def test_what_changes_no_image_changes_no_key(toy_pipeline: Pipeline) -> None:
    found = {
        key(toy_pipeline),
        key(toy_pipeline, preview_every=3),
        key(toy_pipeline, width=64, height=64),  # the initial image's own size
        key(toy_pipeline, concepts=(concept(0.5), concept(0.1, "<unused>"))),
        # The same vectors under another name are the same input.
        key(toy_pipeline, prompt="a photo of <y>", concepts=(concept(0.5, "<y>"),)),
    }
    assert len(found) == 1


def test_tenants_and_bundles_share_nothing(toy_pipeline: Pipeline) -> None:
    request = toy_pipeline.plan(GenerationRequest(**BASE))
    keys = {
        ResultCache(1, bundle_identity=identity).keys(request, tenant)[0]
        for identity, tenant in [("b", "a"), ("b", "c"), ("ba", ""), ("", "ba"), ("d", "a")]
    }
    assert len(keys) == 5


def test_an_image_has_the_key_of_its_own_seed() -> None:
    cache = ResultCache(1, bundle_identity="b")
    several = cache.keys(plan(seed=MAX_SEED - 1, num_images=3), "a")
    assert several[1:] == (
        cache.keys(plan(seed=MAX_SEED), "a")[0],
        cache.keys(plan(seed=0), "a")[0],
    )


def test_bytes_are_bounded_and_the_longest_unused_goes() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    cache = ResultCache(3 * image.nbytes, bundle_identity="b")
    for name in (b"1", b"2", b"3"):
        cache.put(name, image)
    assert cache.find([b"1"]) is not None
    cache.put(b"4", image)
    cache.put(b"4", image)
    assert [cache.find([name]) is not None for name in (b"1", b"2", b"3", b"4")] == [
        True,
        False,
        True,
        True,
    ]
    assert cache.num_bytes == 3 * image.nbytes
    cache.put(b"5", np.zeros((100, 100, 3), np.uint8))
    assert cache.num_bytes == 0, "what is larger than the cache pushes all out, and stays out"


def test_what_is_kept_cannot_be_changed() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    cache = ResultCache(1 << 20, bundle_identity="b")
    cache.put(b"1", image)
    image[:] = 9
    (kept,) = cache.find([b"1"]) or [image]
    assert not kept.any()
    with pytest.raises(ValueError, match="read-only"):
        kept[:] = 9


# The batcher before it --------------------------------------------------------------------------


def drawn(rig: Rig, request: GenerationPlan, tenant: str = "a") -> tuple[list[int], int]:
    """Seeds of the pictures that a request is told, and the steps that it took."""
    assert rig.loop._results is not None
    before = len(rig.model.calls)
    keys = rig.loop._results.keys(request, tenant)
    heard = rig.submit(**_fields(request), tenant=tenant, result_keys=keys)
    rig.run()
    assert isinstance(heard.events[-1], Finished)
    pictures = [e for e in heard.events if isinstance(e, ImageDone)]
    assert [int(e.image[0, 0, 0]) for e in pictures] == [e.seed % 256 for e in pictures]
    return [e.seed for e in pictures], len(rig.model.calls) - before


def _fields(request: GenerationPlan) -> dict[str, Any]:
    of_request = dataclasses.asdict(request.request)
    return {
        "steps": len(request.trajectory.rows),
        "seed": of_request["seed"],
        "num_images": of_request["num_images"],
    }


def test_an_equal_request_is_answered_without_a_call() -> None:
    rig = Rig(results=ResultCache(1 << 20, bundle_identity="b"))
    assert drawn(rig, plan(4, seed=3, num_images=2)) == ([3, 4], 4)
    assert drawn(rig, plan(4, seed=3, num_images=2)) == ([3, 4], 0)
    assert drawn(rig, plan(4, seed=4)) == ([4], 0)
    assert drawn(rig, plan(4, seed=4), tenant="b") == ([4], 4)
    assert drawn(rig, plan(4, seed=4, num_images=2)) == ([4, 5], 4), "one of them is new"
    assert drawn(rig, plan(5, seed=4)) == ([4], 5)


def test_a_request_that_names_no_seed_reads_and_leaves_nothing() -> None:
    results = ResultCache(1 << 20, bundle_identity="b")
    rig = Rig(results=results)
    rig.submit(4, seed=3)
    rig.run()
    assert results.num_bytes == 0
