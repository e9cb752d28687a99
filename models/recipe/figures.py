"""All figures of a model, measured and written: its autoencoder, its obedience, words it learns.

Parts can be measured one at a time: `model.json` keeps each with its own date, time and hardware,
and the page is made from it.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging
from jaxtyping import Float64
from tqdm import tqdm

from benchmarks.run import machine
from engine.files import write_atomically
from engine.requests import RgbImage
from models.recipe import inversions, sheets
from models.recipe.compositions import Composer
from models.recipe.errors import RecipeError
from models.recipe.exam import Examiner, Question, Share, exam_questions
from models.recipe.inversions import Inversion
from models.recipe.objects import HELD_OUT_OBJECTS
from models.recipe.stages import HELD_OUT_INDEX
from trainer.evaluator import SPEC_FILE, Evaluator

PARTS = ("autoencoder", "text", "inversion")
STEPS, GUIDANCE_SCALE = 25, 4.0
_DECODED_PICTURES = 256
_AT_ONCE = 32
_CONCEPTS = Path("examples/concepts")
_SHEET = Path("docs/images/inversions.png")
# What the `base` setting has to reach: shares, and PSNR by the size in pixels.
_BARS = {"object": 0.7, "both objects": 0.5, "style": 0.8, "background colour": 0.9}
_PSNR_BARS_DB = {64: 26, 128: 28}
_COLOURS_BAR = 0.8


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is measured, and with what."""

    model: Path  # in the diffusers layout
    setting: str
    composer: Composer  # of the objects that the model was taught
    every_composer: Composer  # of all objects but the held-out ones
    evaluator: Path
    device: torch.device
    report: Path = Path("docs/benchmarks/model.json")  # the page is beside it, as .md

    def measure(self, parts: Sequence[str], command: str) -> str:
        """Measures some of `PARTS`, writes the report, and returns its page.

        Errors:
            RecipeError: there is no model.
        """
        if not (self.model / "model_index.json").is_file():
            raise RecipeError(
                f"there is no model in {self.model}; make it with: models.recipe export"
            )
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "autoencoder": self._autoencoder,
            "text": self._text,
            "inversion": self._inversion,
        }
        results = self._stored()
        for part in parts:
            started = time.monotonic()
            figures = measures[part]()
            seconds = round(time.monotonic() - started)
            results["parts"][part] = {
                **figures, "seconds": seconds, "command": command, "machine": self._machine(),
            }  # fmt: skip
            write_atomically(self.report, (json.dumps(results, indent=2) + "\n").encode())
        text = page(results)
        write_atomically(self.report.with_suffix(".md"), text.encode())
        return text

    def _stored(self) -> dict[str, Any]:
        """What earlier runs measured of the same model."""
        what = {"model": str(self.model), "setting": self.setting}
        if self.report.is_file():
            stored = json.loads(self.report.read_text())
            if {name: stored.get(name) for name in what} == what:
                return stored
        return {**what, "parts": {}}

    def _machine(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            return {**machine(), "device": torch.cuda.get_device_name(self.device)}
        return machine()

    def _pipeline(self) -> StableDiffusionPipeline:
        logging.disable_progress_bar()
        pipeline = StableDiffusionPipeline.from_pretrained(
            self.model, torch_dtype=torch.float32, safety_checker=None
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def _autoencoder(self) -> dict[str, Any]:
        vae, values = self._pipeline().vae, []
        for first in tqdm(range(0, _DECODED_PICTURES, _AT_ONCE), desc="autoencoder"):
            indices = range(HELD_OUT_INDEX + first, HELD_OUT_INDEX + first + _AT_ONCE)
            pixels = np.stack([self.every_composer.compose(index).pixels for index in indices])
            values.append(psnr_db(sheets.decoded_again(vae, pixels), pixels))
        every = np.concatenate(values)
        return {
            "pictures": len(every),
            "image_size": self.every_composer.size,
            "mean_psnr_db": round(float(every.mean()), 2),
            "median_psnr_db": round(float(np.median(every)), 2),
        }

    def _text(self) -> dict[str, Any]:
        examiner = Examiner(Evaluator.open(self.evaluator))
        questions = exam_questions(self.composer, HELD_OUT_INDEX)
        drawn = self._drawn([question.prompt for question in questions])
        composed = [question.picture for question in questions]
        return {
            "prompts": len(questions),
            "sampler": f"DDIM, {STEPS} steps, guidance {GUIDANCE_SCALE}, seeds 0 to "
            f"{len(questions) - 1}",
            "nouns": len(examiner.nouns),
            "styles": len(examiner.styles),
            "colours": len(examiner.colours),
            "drawn": _stored_shares(examiner.marks(drawn, questions)),
            "composed": _stored_shares(examiner.marks(composed, questions)),
            "missed": _missed(examiner, drawn, questions),
            "accuracy": json.loads((self.evaluator / SPEC_FILE).read_text()).get("accuracy", {}),
        }

    def _drawn(self, prompts: list[str]) -> list[RgbImage]:
        pipeline, drawn = self._pipeline(), list[RgbImage]()
        for first in tqdm(range(0, len(prompts), _AT_ONCE), desc="drawing prompts"):
            drawn += list(
                sheets.draw(
                    pipeline,
                    prompts[first : first + _AT_ONCE],
                    steps=STEPS,
                    guidance_scale=GUIDANCE_SCALE,
                    seed=first,
                )
            )
        return drawn

    def _inversion(self) -> dict[str, Any]:
        folders = [_CONCEPTS / slug for slug in HELD_OUT_OBJECTS]
        examiner = Examiner(Evaluator.open(self.evaluator))
        learned = inversions.learn_all(self.model, folders, self.device)
        model = inversions.on_device(self.model, self.device)
        judged = inversions.judge_all(model, learned, folders, self.composer.nouns, examiner)
        pictures = np.stack([picture for word in judged for picture in word.shown])
        sheets.save_sheet(pictures, _SHEET, columns=len(judged[0].shown))
        return inversion_figures(judged)


def chosen_parts(names: str) -> list[str]:
    """The parts of a list with commas.

    Errors:
        RecipeError: one of them is not among `PARTS`.
    """
    parts = [name.strip() for name in names.split(",")]
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise RecipeError(f"the figures have no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return parts


def psnr_db(decoded: sheets.Pictures, pixels: sheets.Pictures) -> Float64[np.ndarray, " count"]:
    """Peak signal-to-noise ratio of each picture; levels from 0 to 255."""
    error = decoded.astype(np.float64) - pixels.astype(np.float64)
    squared = np.square(error).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(squared, 1e-3))  # equal pictures: 78 dB


def inversion_figures(judged: Sequence[Inversion]) -> dict[str, Any]:
    """The figures of all words together, and of each."""
    colours = Share(sum(w.colours.hits for w in judged), sum(w.colours.asked for w in judged))
    named = Share(sum(w.named.hits for w in judged), sum(w.named.asked for w in judged))
    above = Share(sum(word.above_nearest for word in judged), len(judged))
    return {
        "above_nearest": asdict(above),
        "colours": asdict(colours),
        "named": asdict(named),
        "words": [
            {
                "name": word.name,
                "similarity": round(word.similarity, 3),
                "nearest_noun": word.nearest_noun,
                "nearest_similarity": round(word.nearest_similarity, 3),
                "colours": asdict(word.colours),
                "named": asdict(word.named),
                "initial_loss": round(word.initial_loss, 4),
                "best_loss": round(word.best_loss, 4),
            }
            for word in judged
        ],
    }


def _stored_shares(shares: dict[str, Share]) -> dict[str, dict[str, int]]:
    return {name: asdict(share) for name, share in shares.items()}


def _missed(
    examiner: Examiner, drawn: Sequence[RgbImage], questions: Sequence[Question]
) -> dict[str, str]:
    """Prompts of one object whose picture looks like another one, and which."""
    logits = examiner.noun_logits(examiner.evaluator.image_embeds(drawn))
    found = [examiner.nouns[place] for place in logits.argmax(axis=1)]
    return {
        question.prompt: noun
        for question, noun in zip(questions, found, strict=True)
        if len(question.nouns) == 1 and noun != question.nouns[0]
    }


def page(results: dict[str, Any]) -> str:
    """The report as a page; every figure in it comes from `results`."""
    makers = {"autoencoder": _autoencoder_page, "text": _text_page, "inversion": _inversion_page}
    lines = [
        f"# The model in `{results['model']}` (setting `{results['setting']}`)",
        "",
        "Bars are those of the setting `base`.",
        "",
    ]
    for part in PARTS:
        if part in results["parts"]:
            figures = results["parts"][part]
            lines += [*makers[part](figures), "", _made(figures), ""]
    return "\n".join(lines).rstrip() + "\n"


def _made(figures: dict[str, Any]) -> str:
    info = figures["machine"]
    device = info.get("device") or f"{info['processor']}, {info['cores']} cores"
    return f"`{figures['command']}`, {info['date']}, {device}: {figures['seconds']} s."


def _autoencoder_page(figures: dict[str, Any]) -> list[str]:
    size = figures["image_size"]
    bar = f" (bar: {_PSNR_BARS_DB[size]} dB)" if size in _PSNR_BARS_DB else ""
    return [
        "## Autoencoder",
        "",
        f"PSNR on {figures['pictures']} compositions of {size} pixels that no training has seen: "
        f"mean {figures['mean_psnr_db']} dB, median {figures['median_psnr_db']} dB{bar}.",
    ]


def _text_page(figures: dict[str, Any]) -> list[str]:
    chances = {name: figures[name] for name in ("nouns", "styles", "colours")}
    rows = [
        f"| {name} | {Share(**share)} | {Share(**figures['composed'][name])} | {100 * bar:.0f} % |"
        for (name, share), bar in zip(figures["drawn"].items(), _BARS.values(), strict=True)
    ]
    return [
        "## Text to image",
        "",
        f"{figures['prompts']} fixed prompts; {figures['sampler']}. First choice of the evaluator "
        f"among {chances['nouns']} nouns, {chances['styles']} styles and {chances['colours']} "
        "background colours; both objects: the first two. Beside it the same of real pictures, "
        "composed with the facts of the prompts: the ceiling.",
        "",
        "| | drawn | composed | bar |",
        "|---|---|---|---|",
        *rows,
        "",
        "The evaluator itself, on compositions that it has not seen, in all styles:",
        "",
        "| | right |",
        "|---|---|",
        *(f"| {name} | {Share(**share)} |" for name, share in figures["accuracy"].items()),
    ]


def _inversion_page(figures: dict[str, Any]) -> list[str]:
    above = figures["above_nearest"]
    rows = [
        f"| {word['name']} | {word['similarity']:.3f} | {word['nearest_similarity']:.3f} "
        f"({word['nearest_noun']}) | {Share(**word['named'])} | {Share(**word['colours'])} |"
        for word in figures["words"]
    ]
    return [
        "## Words that it learns",
        "",
        "Objects that no training has seen, four images each, learned with the trainer's defaults. "
        "Similarity: the evaluator's mean cosine of drawn pictures to the images; beside it the "
        "same of the known noun that comes nearest. Named: how often the evaluator, which has seen "
        "the object, names it first among all. Colours: sixteen background colours asked for.",
        "",
        f"Above the nearest known word: {above['hits']} of {above['asked']} (bar: 10 of 12). "
        f"Background colours obeyed: {Share(**figures['colours'])} "
        f"(bar: {100 * _COLOURS_BAR:.0f} %). Named: {Share(**figures['named'])}.",
        "",
        "| object | similarity | nearest known word | named | colours |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "![Two images of each, then what its word draws](../images/inversions.png)",
    ]
