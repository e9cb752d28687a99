"""The requests of the load: different in steps, sampler, guidance, concept and size.

The shares are exact and only the order is random, so that every list of a length is the same work
and a load is the load that it is called. All systems get the same list at the same times.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from engine.concepts import Concept
from engine.requests import GenerationRequest

T = TypeVar("T")

STEPS: dict[int, float] = {4: 0.40, 8: 0.30, 20: 0.22, 50: 0.08}
GUIDANCE_SCALES: dict[float, float] = {1.0: 0.3, 4.0: 0.7}
SIDES: dict[int, float] = {64: 0.9, 96: 0.1}  # pixels
# One denoiser call a step each, so that requests of equal steps can share a static batch.
SAMPLERS: dict[str, float] = dict.fromkeys(("ddim", "euler", "euler_a", "dpmpp_2m", "unipc"), 0.2)
NUM_CONCEPTS = 4
PROMPTS: dict[str, float] = {
    **{f"a photo of <x{n}> on a blue background": 0.8 / NUM_CONCEPTS for n in range(NUM_CONCEPTS)},
    "a photo of a dog on a red background": 0.2,
}
# What a caller waits for: so long, and so many times what the image takes with nobody else there.
DEADLINE_S, DEADLINE_STRETCH = 1.0, 5.0


def deadline_s(alone_s: float) -> float:
    """The time that a request has from its arrival."""
    return DEADLINE_S + DEADLINE_STRETCH * alone_s


def make_concepts(dim: int) -> dict[str, Concept]:
    """The concepts of the prompts by placeholder, as long as the vocabulary's words."""
    vectors = np.random.default_rng(0).normal(0, 1, (NUM_CONCEPTS, 1, dim)).astype(np.float32)
    tokens = [f"<x{n}>" for n in range(NUM_CONCEPTS)]
    return {
        token: Concept(
            placeholder_token=token, learned_embeddings=0.23 * vector / np.linalg.norm(vector)
        )
        for token, vector in zip(tokens, vectors, strict=True)
    }


def make_requests(
    count: int, concepts: Mapping[str, Concept], *, seed: int
) -> list[GenerationRequest]:
    """`count` requests of one image each."""
    random = np.random.default_rng(seed)
    columns = (
        _shuffled(STEPS, count, random),
        _shuffled(GUIDANCE_SCALES, count, random),
        _shuffled(SIDES, count, random),
        _shuffled(SAMPLERS, count, random),
        _shuffled(PROMPTS, count, random),
    )
    return [
        GenerationRequest(
            prompt=prompt,
            concepts=tuple(c for token, c in concepts.items() if token in prompt),
            width=side,
            height=side,
            seed=index,
            sampler=sampler,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
        for index, (steps, guidance_scale, side, sampler, prompt) in enumerate(
            zip(*columns, strict=True)
        )
    ]


def arrival_times(count: int, rate: float, *, seed: int) -> list[float]:
    """Seconds from the start of `count` Poisson arrivals at `rate` per second.

    Given their number, the arrivals of a Poisson process in a span are uniform in it: so the rate
    over the span is exact, and another rate gives the same times, stretched.
    """
    times = np.random.default_rng(seed).uniform(0.0, 1.0, count)
    return [float(time) * count / rate for time in np.sort(times)]


def _shuffled(shares: Mapping[T, float], count: int, random: np.random.Generator) -> Sequence[T]:
    """`count` values in these shares (the largest remainders get what is left), in random order."""
    exact = {value: share * count for value, share in shares.items()}
    whole = {value: int(number + 1e-9) for value, number in exact.items()}
    by_rest = sorted(exact, key=lambda value: whole[value] - exact[value])
    for value in by_rest[: count - sum(whole.values())]:
        whole[value] += 1
    values = [value for value, number in whole.items() for _ in range(number)]
    return [values[place] for place in random.permutation(count)]
