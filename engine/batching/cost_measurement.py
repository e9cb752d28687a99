"""The cost table of a model on this device, measured with real calls before it serves."""

import logging
import time
from collections.abc import Callable, Sequence
from statistics import median

from engine.batching.config import BatcherConfig
from engine.batching.model import InFlight, Model
from engine.batching.step_costs import CostTable
from engine.planner import GenerationPlan, Planner
from engine.requests import GenerationRequest

logger = logging.getLogger(__name__)

NUM_STEPS = 4  # denoiser calls of a size: the first warms up, the median of the others counts


def measuring_plan(planner: Planner) -> GenerationPlan:
    """One row of the model's own size, for a few steps."""
    samplers = planner.bundle.sampler_tables
    return planner.plan(
        GenerationRequest(
            prompt="",
            sampler="ddim" if "ddim" in samplers else min(samplers),
            num_inference_steps=NUM_STEPS,
            guidance_scale=1.0,
        )
    )


def measure_costs(
    model: Model,
    plan: GenerationPlan,
    config: BatcherConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> CostTable:
    """Denoiser calls of 1, 2, 4, 8, ... rows, and of the most that a call may have; the decoder.

    Once `cost_measurement_s` is spent no other call begins: what is missing is drawn on from the
    sizes that were measured, and learned while serving. At least one call is made, which on a slow
    device may take longer than that. A size that fails ends it, unless it is the first. `plan` has
    one row an image.
    """
    table = CostTable()
    end = clock() + config.cost_measurement_s
    area, decodes = plan.width * plan.height, list[float]()
    for rows in _row_counts(config.max_batch_rows):
        images: list[InFlight] = [image for _ in range(rows) for image in model.begin(plan)]
        try:
            table.steps.set(area, rows, _step_ms(model, images, end, clock))
        except Exception:
            model.release(images)
            if rows == 1:
                raise
            logger.warning(
                "a call of %d rows fails here; lower max_batch_rows", rows, exc_info=True
            )
            break
        decodes += _decode_ms(model, images, end, clock, most=NUM_STEPS - len(decodes))
        if decodes:
            table.decodes.set(area, 1, median(decodes[1:] or decodes))
        if clock() >= end:
            logger.info("costs are measured up to %d rows; the time for it is over", rows)
            break
    return table


def _row_counts(max_rows: int) -> list[int]:
    powers = [1 << n for n in range(max_rows.bit_length())]
    return powers if powers[-1] == max_rows else [*powers, max_rows]


def _step_ms(
    model: Model, images: Sequence[InFlight], end: float, clock: Callable[[], float]
) -> float:
    """The time of a call of these images: the median of those that there was time for."""
    times = list[float]()
    while not times or (not images[0].is_done and clock() < end):
        started = clock()
        model.step(images)
        times.append(1e3 * (clock() - started))
    return median(times[1:] or times)


def _decode_ms(
    model: Model,
    images: Sequence[InFlight],
    end: float,
    clock: Callable[[], float],
    *,
    most: int,
) -> list[float]:
    """The times to decode `most` of these one by one, as far as there is time; ends them all."""
    times = list[float]()
    for place, image in enumerate(images):
        if len(times) == most or not image.is_done or clock() >= end:
            model.release(images[place:])
            break
        started = clock()
        model.decode([image])
        times.append(1e3 * (clock() - started))
    return times
