"""Drawing what is judged, with the runtime that serves it: requests in, pictures out, batched."""

import sys
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

from engine.batching.batcher import Batcher, BatcherConfig, Event, Failed, Finished, ImageDone
from engine.pipeline import GenerationPlan, Pipeline
from engine.requests import GenerationRequest, RgbImage
from trainer.evaluation_errors import EvaluationError

MAX_SAMPLES = 1000
MAX_SEED = 10**9
_PROMPT_STRIDE = 1000  # noise seeds: no two pictures of a judgement share one
_SEED_STRIDE = 1_000_000


def noise_seed(seed: int, prompt_place: int) -> int:
    """The noise seed of a prompt's first picture; the others follow by one.

    The same for all concepts and references: they are compared on the same noise.
    """
    return seed * _SEED_STRIDE + prompt_place * _PROMPT_STRIDE


def draw(
    pipeline: Pipeline, requests: Sequence[GenerationRequest]
) -> Iterator[tuple[int, list[RgbImage]]]:
    """Pictures of each request with its place, in the order in which they are done.

    All requests are checked before the first is drawn. Raises what a request failed with, and
    `EvaluationError` for a prompt that does not fit the model.
    """
    plans = [checked_plan(pipeline, request) for request in requests]
    total = sum(request.num_images for request in requests)
    # All of it waits here, however long it takes.
    config = BatcherConfig(max_queued_images=max(total, 1), max_queued_ms=sys.maxsize)
    batcher = Batcher(pipeline, config)
    events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
    try:
        for place, plan in enumerate(plans):
            batcher.submit(plan, lambda event, place=place: events.put((place, event)))
        yield from _gathered(events, len(plans))
    finally:
        batcher.close()


def checked_plan(pipeline: Pipeline, request: GenerationRequest) -> GenerationPlan:
    """The plan of a request; raises what can be mended, `EvaluationError` for a prompt's length."""
    plan = pipeline.plan(request)
    if plan.prompt_report.cut:
        raise EvaluationError(
            f"the prompt {request.prompt[:60]!r} is longer than the model reads; shorten it"
        )
    return plan


def _gathered(
    events: "SimpleQueue[tuple[int, Event]]", count: int
) -> Iterator[tuple[int, list[RgbImage]]]:
    pictures: dict[int, dict[int, RgbImage]] = {place: {} for place in range(count)}
    while pictures:
        place, event = events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, ImageDone):
            pictures[place][event.image_index] = event.image
        elif isinstance(event, Finished):
            done = pictures.pop(place)
            yield place, [done[index] for index in sorted(done)]
