"""What each way of learning a word is worth: an ablation on the embedded model's unseen objects.

python -m benchmarks.learning [--settings NAMES] [--concepts NAMES] [--seeds N]

Each result is kept in docs/benchmarks/learning.json as soon as it is there, and no run is measured
twice: a benchmark that was stopped goes on, and more seeds can be added later. One process a core,
each on a single thread.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.peers import MODEL, ROOT
from benchmarks.run import machine
from engine.files import write_atomically
from engine.sessions import usable_cores
from models.recipe.exam import Examiner
from models.recipe.inversions import COLOUR_PROMPTS, NEUTRAL_PROMPTS, read_levels
from models.recipe.objects import COLOURS, HELD_OUT_OBJECTS
from trainer.evaluator import Evaluator, mean_similarity
from trainer.images import read_images
from trainer.learning import learn
from trainer.model import load_model
from trainer.options import LearnOptions
from trainer.quiet import quiet_libraries
from trainer.sampling import image_size, sample_images
from trainer.splicing import as_concept

REPORT = ROOT / "docs" / "benchmarks" / "learning.json"
EVALUATOR = ROOT / "models" / "evaluator"
CONCEPTS = ROOT / "examples" / "concepts"
STEPS, GUIDANCE_SCALE = 25, 4.0
_TOKEN = "<word>"

# What is compared; the first is the default course. Each differs from it in what is named alone.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "half the steps": {"steps": 200},
    "4 vectors": {"num_vectors": 4},
    "searched initializer": {"initializer_token": "auto"},
    "timestep focus 0.8": {"timestep_focus": 0.8},
    "antithetic noise": {"antithetic": True},
    "dti": {"optimizer": "dti"},
    "dti, searched initializer": {"optimizer": "dti", "initializer_token": "auto"},
    "adamw as the paper has it": {"optimizer": "adamw"},
    "stop by dvar": {"stop": "dvar"},
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One word, learned and judged."""

    setting: str
    concept: str  # name of its folder
    seed: int
    rows: int  # samples that went through the denoiser with a gradient
    seconds: float  # of learning, on one thread
    evaluation_loss: float
    similarity: float  # mean cosine of neutral pictures to the images
    edited_similarity: float  # the same of pictures on coloured backgrounds
    colours: int  # of sixteen backgrounds obeyed
    named: int  # of eight neutral pictures that the evaluator calls by the object's noun

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.setting, self.concept, self.seed)


def measure(setting: str, concept: str, seed: int) -> Measured:
    """Learn one word by one of `SETTINGS` and judge what it draws."""
    torch.set_num_threads(1)
    quiet_libraries()
    model = load_model(str(MODEL))
    folder, size = CONCEPTS / concept, image_size(model)
    options = LearnOptions(seed=seed, **SETTINGS[setting])
    started = time.monotonic()
    *_, state = learn(model, read_images(folder, size=size), options)
    seconds = time.monotonic() - started
    word = as_concept(model, state.best_vectors, placeholder_token=_TOKEN)
    prompts = [prompt.format(_TOKEN) for prompt in (*NEUTRAL_PROMPTS, *COLOUR_PROMPTS)]
    drawn = sample_images(
        model, word, prompts, size=size, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE
    )
    examiner = Examiner(Evaluator.open(EVALUATOR))
    references = examiner.evaluator.image_embeds(read_levels(folder, size))
    embeds = examiner.evaluator.image_embeds([np.asarray(picture) for picture in drawn])
    neutral, coloured = np.split(embeds, [len(NEUTRAL_PROMPTS)])
    named = [examiner.nouns[place] for place in examiner.noun_logits(neutral).argmax(axis=1)]
    found = examiner.colours_found(coloured)
    return Measured(
        setting=setting,
        concept=concept,
        seed=seed,
        rows=state.step * options.batch_size,
        seconds=round(seconds, 1),
        evaluation_loss=round(state.best_evaluation_loss, 5),
        similarity=round(mean_similarity(neutral, references), 4),
        edited_similarity=round(mean_similarity(coloured, references), 4),
        colours=sum(a == b for a, b in zip(found, COLOURS, strict=True)),
        named=named.count(concept.replace("-", " ")),
    )


def page(results: Sequence[Measured], info: dict[str, Any]) -> str:
    """The results as a table; means over the words that every setting has learned."""
    names = [name for name in SETTINGS if any(one.setting == name for one in results)]
    shared = set.intersection(
        *({one.key[1:] for one in results if one.setting == name} for name in names)
    )
    words, seeds = {concept for concept, _ in shared}, {seed for _, seed in shared}
    lines = [
        "# Ways of learning a word, compared",
        "",
        f"`python -m benchmarks.learning`, {info['date']}, {info['processor']}, {info['cores']} "
        f"cores, one thread a run. The embedded model; words for objects that it has never seen: "
        f"{', '.join(sorted(words))}; seeds: {len(seeds)}. Means; in brackets the standard "
        "deviation over the words. Similarity: the evaluator's cosine to the images; edited: on a "
        "background of another colour. Times were taken beside other work and say little.",
        "",
        "| setting | rows | seconds | loss | similarity | edited | colours obeyed | named |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(name, [o for o in results if o.setting == name and o.key[1:] in shared])
              for name in names]  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(name: str, results: Sequence[Measured]) -> str:
    def mean(field: str) -> float:
        return statistics.fmean(getattr(one, field) for one in results)

    spread = statistics.pstdev(one.similarity for one in results)
    return (
        f"| {name} | {mean('rows'):.0f} | {mean('seconds'):.0f} | {mean('evaluation_loss'):.4f} | "
        f"{mean('similarity'):.3f} ({spread:.3f}) | {mean('edited_similarity'):.3f} | "
        f"{mean('colours') / len(COLOUR_PROMPTS):.0%} | "
        f"{mean('named') / len(NEUTRAL_PROMPTS):.0%} |"
    )


def _stored(report: Path) -> list[Measured]:
    if not report.is_file():
        return []
    return [Measured(**one) for one in json.loads(report.read_text())["results"]]


def _store(report: Path, results: Sequence[Measured]) -> None:
    info = machine()
    content = {"machine": info, "results": [dataclasses.asdict(one) for one in results]}
    write_atomically(report, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(report.with_suffix(".md"), page(results, info).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", default=";".join(SETTINGS), help="names, with semicolons")
    parser.add_argument("--concepts", default=",".join(HELD_OUT_OBJECTS), help="with commas")
    parser.add_argument("--seeds", type=int, default=1, help="0 to N - 1 (%(default)s)")
    parser.add_argument("--report", type=Path, default=REPORT, help="JSON; the page is beside it")
    arguments = parser.parse_args()
    settings, concepts = arguments.settings.split(";"), arguments.concepts.split(",")
    if unknown := [name for name in settings if name not in SETTINGS]:
        parser.error(f"no setting {unknown[0]!r}; there are {'; '.join(SETTINGS)}")
    if unknown := [name for name in concepts if not (CONCEPTS / name).is_dir()]:
        parser.error(f"no concept {unknown[0]!r} in {CONCEPTS}")
    results = _stored(arguments.report)
    done = {one.key for one in results}
    keys = [
        (setting, concept, seed)
        for seed in range(arguments.seeds)
        for concept in concepts
        for setting in settings
        if (setting, concept, seed) not in done
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), context) as pool:
        futures = [pool.submit(measure, *key) for key in keys]
        for future in tqdm(as_completed(futures), total=len(futures), desc="words", unit="word"):
            results.append(future.result())
            _store(arguments.report, results)
    print(page(results, machine()))


if __name__ == "__main__":
    main()
