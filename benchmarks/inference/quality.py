"""What 8 bits cost: the same 80 prompts drawn in float32 and in int8, compared and judged.

The judge is the evaluator in `models/evaluator`, which shares no weights with the model.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inference.cases import Prepared
from benchmarks.peers import ROOT
from engine.pipeline import Pipeline, sound
from engine.requests import GenerationRequest, RgbImage
from models.recipe.exam import Examiner, Question
from models.recipe.objects import SMALL_OBJECTS
from trainer.evaluator import Evaluator

STEPS, GUIDANCE_SCALE = 20, 4.0


def measure_quality(prepared: Prepared) -> dict[str, Any]:
    """Every object of the embedded model on a plain background; none is a calibration prompt."""
    examiner = Examiner(Evaluator.open(ROOT / "models" / "evaluator"))
    questions = _questions(examiner.colours)
    drawn = {kind: _draw(prepared.bundle(kind), questions) for kind in ("fp32", "int8")}
    psnr = [_psnr_db(one, two) for one, two in zip(*drawn.values(), strict=True)]
    embeds = [examiner.evaluator.image_embeds(images) for images in drawn.values()]
    marks = {kind: examiner.marks(images, questions) for kind, images in drawn.items()}
    return {
        "prompts": len(questions),
        "psnr_db": {
            "median": float(np.median(psnr)),
            "lowest": min(psnr),
            "tenth": float(np.quantile(psnr, 0.1)),
        },
        "likeness": float((embeds[0] * embeds[1]).sum(axis=1).mean()),
        "marks": {
            kind: {name: str(shares[name]) for name in ("object", "background colour")}
            for kind, shares in marks.items()
        },
    }


def _questions(colours: tuple[str, ...]) -> list[Question]:
    nothing = np.zeros((1, 1, 3), np.uint8)  # the picture is for another part of the exam
    return [
        Question(
            prompt=f"a {noun} on a {colour} background",
            nouns=(noun,),
            style=None,
            colour=colour,
            picture=nothing,
        )
        for place, noun in enumerate(SMALL_OBJECTS)
        for colour in [colours[place % len(colours)]]
    ]


def _draw(bundle: Path, questions: list[Question]) -> list[RgbImage]:
    pipeline, drawn = Pipeline.open(bundle), list[RgbImage]()
    for seed, question in enumerate(questions):
        request = GenerationRequest(
            prompt=question.prompt,
            seed=seed,
            sampler="ddim",
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
        )
        images = pipeline.begin(pipeline.plan(request))
        while not images[0].is_done:
            pipeline.step(images)
        drawn += sound(pipeline.decode(images))
    return drawn


def _psnr_db(one: RgbImage, two: RgbImage) -> float:
    noise = np.mean((one.astype(np.float64) - two) ** 2) / 255**2
    return 10 * float(np.log10(1 / max(noise, 1e-10)))
