"""What a change of concept costs: splicing here, growing tokenizer and table in diffusers."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import Diffusers, OneWord, example_concept
from engine.concepts import write_concept
from engine.store.concept_store import ConceptStore

NUM_CONCEPTS = 1000
NUM_REQUESTS = 100


def measure(oneword: OneWord, diffusers: Diffusers) -> dict[str, Any]:
    """Median ms of: reading a prompt with a concept, and with a plain word in its place; the same
    with one of 1,000 stored concepts; diffusers' load and unload of one concept."""
    with_concept, with_word = _splice_ms(oneword)
    return {
        "oneword_with_concept_ms": with_concept,
        "oneword_with_word_ms": with_word,
        "oneword_read_prompt_ms": _read_prompt_ms(oneword),
        "diffusers_load_and_unload_ms": _load_ms(diffusers),
    }


def _median_ms(call: Callable[[int], object], count: int) -> float:
    times: list[float] = []
    for index in range(count):
        started = time.perf_counter()
        call(index)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def _splice_ms(oneword: OneWord) -> tuple[float, float]:
    """The same prompt with a concept and with a plain word in its place, in alternating rounds."""
    reader = oneword.pipeline.reader
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2000):
        for values, prompt in zip(times, ("a photo of <x>", "a photo of dog"), strict=True):
            started = time.perf_counter()
            reader.read(prompt, [oneword.concept])
            values.append(1e3 * (time.perf_counter() - started))
    with_concept, with_word = map(statistics.median, times)
    return with_concept, with_word


def _read_prompt_ms(oneword: OneWord) -> float:
    """Look one of 1,000 stored concepts up, tokenize, splice: all that a concept costs."""
    dim = oneword.pipeline.bundle.manifest.text.dim
    store = ConceptStore.temporary()
    for index in range(NUM_CONCEPTS):
        concept = example_concept(dim, seed=index)
        store.import_concept(
            type(concept)(
                placeholder_token=f"<c{index}>", learned_embeddings=concept.learned_embeddings
            )
        )
    picks = np.random.default_rng(0).choice(NUM_CONCEPTS, NUM_REQUESTS)

    def read(index: int) -> None:
        token = f"<c{picks[index]}>"
        oneword.pipeline.reader.read(f"a photo of {token}", [store.find_by_token(token)])

    try:
        return _median_ms(read, NUM_REQUESTS)
    finally:
        store.close()


def _load_ms(diffusers: Diffusers) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learned_embeds.safetensors"
        dim = diffusers.pipe.text_encoder.config.hidden_size
        concept = example_concept(dim)
        write_concept(
            type(concept)(placeholder_token="<new>", learned_embeddings=concept.learned_embeddings),
            path,
            "diffusers",
        )

        def load(_: int) -> None:
            diffusers.pipe.load_textual_inversion(str(path))
            diffusers.pipe.unload_textual_inversion("<new>")

        return _median_ms(load, 20)
