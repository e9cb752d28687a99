"""What a guidance interval saves, and what it costs: time, PSNR to full guidance, text score.

    python -m benchmarks.guidance_interval [--output FILE] [--rounds N]

On the embedded model in this process; the evaluator that comes with it says how well a picture fits
its prompt. Intervals take turns, so that a machine that slows down slows all of them.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.peers import BUNDLE, ROOT
from benchmarks.run import machine
from engine.batching.batcher import Batcher, generate
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest, RgbImage
from trainer.encoders import DEFAULT_ENCODER, EvaluatorEncoder
from trainer.evaluator import read_spec
from trainer.scores import paired_cosines

INTERVALS = ((0.0, 1.0), (0.0, 0.8), (0.0, 0.6), (0.0, 0.4), (0.1, 0.8), (0.2, 0.8), (0.2, 0.6),
             (0.4, 1.0))  # fmt: skip
STEPS, GUIDANCE, SEEDS, NOUNS = 20, 4.0, 3, 12
Interval = tuple[float, float]


def prompts() -> list[str]:
    """One for each of some nouns that the evaluator knows, spread over its list."""
    spec = read_spec(ROOT / DEFAULT_ENCODER)
    nouns = [noun for noun in spec.nouns if noun not in spec.held_out_nouns]
    chosen = nouns[:: max(len(nouns) // NOUNS, 1)][:NOUNS]
    return [f"a drawing of a {noun}" for noun in chosen]


def request(prompt: str, seed: int, interval: Interval | None) -> GenerationRequest:
    """`interval` None: no guidance at all."""
    start, end = interval or (0.0, 1.0)
    return GenerationRequest(
        prompt=prompt,
        seed=seed,
        num_inference_steps=STEPS,
        guidance_scale=1.0 if interval is None else GUIDANCE,
        guidance_start=start,
        guidance_end=end,
    )


def measure(rounds: int) -> list[dict[str, Any]]:
    pipeline = Pipeline.open(BUNDLE)
    batcher = Batcher(pipeline)
    texts = prompts()
    drawn: dict[Interval | None, list[list[RgbImage]]] = {}
    times: dict[Interval | None, list[float]] = {}
    cases: tuple[Interval | None, ...] = (*INTERVALS, None)
    for index, text in enumerate(texts):
        for seed in range(SEEDS):
            for case in cases:
                images, _ = generate(batcher, pipeline.plan(request(text, seed, case)))
                rows = drawn.setdefault(case, [[] for _ in texts])
                rows[index].append(images[0].image)
    for round_ in range(rounds):
        for case in cases:
            plan = pipeline.plan(request(texts[round_ % len(texts)], round_, case))
            started = time.perf_counter()
            generate(batcher, plan)
            times.setdefault(case, []).append(1e3 * (time.perf_counter() - started))
    batcher.close()
    encoder = EvaluatorEncoder.open(ROOT / DEFAULT_ENCODER)
    embeds = encoder.text_embeds(texts)
    full = drawn[INTERVALS[0]]
    return [
        {
            "interval": case,
            "rows": _rows(case),
            "ms": median(times[case]),
            "psnr_db": _psnr_db(drawn[case], full),
            "score": _score(encoder, drawn[case], embeds),
        }
        for case in cases
    ]


def _rows(case: Interval | None) -> int:
    """Denoiser rows of one image."""
    if case is None:
        return STEPS
    return STEPS + sum(case[0] <= (i + 0.5) / STEPS < case[1] for i in range(STEPS))


def _psnr_db(images: list[list[RgbImage]], full: list[list[RgbImage]]) -> float | None:
    """The median over pictures; None where they are the same."""
    found = [
        float(np.mean((one / 255.0 - other / 255.0) ** 2))
        for ours, theirs in zip(images, full, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return None if not any(found) else float(median(-10 * np.log10(max(e, 1e-12)) for e in found))


def _score(encoder: EvaluatorEncoder, images: list[list[RgbImage]], texts: np.ndarray) -> float:
    samples = np.stack([encoder.image_embeds(of_prompt) for of_prompt in images])
    return float(paired_cosines(samples, texts).mean())


def report(results: list[dict[str, Any]]) -> str:
    about = machine()
    lines = [
        f"Embedded model, {STEPS} DDIM steps, guidance {GUIDANCE:g}, {NOUNS} prompts x {SEEDS} "
        f"seeds; {about['cores']} cores of {about['processor']}, {about['date']}.",
        "",
        "| interval | rows | ms an image | faster | PSNR to full guidance, dB | text score |",
        "|---|---|---|---|---|---|",
    ]
    full_ms = results[0]["ms"]
    for one in results:
        case = one["interval"]
        name = "no guidance" if case is None else f"{case[0]:g}:{case[1]:g}"
        psnr = "same" if one["psnr_db"] is None else f"{one['psnr_db']:.1f}"
        lines.append(
            f"| {name} | {one['rows']} | {one['ms']:.1f} | {full_ms / one['ms']:.2f} x | {psnr} "
            f"| {one['score']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the table here as well")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    arguments = parser.parse_args()
    text = report(measure(arguments.rounds))
    if arguments.output:
        arguments.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
