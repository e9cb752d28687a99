"""How the benchmarks of the field measure: what they draw, and which of our measures is theirs.

The prompts of DreamBench and CustomConcept101 are theirs and come with their data: a mode reads
the file that the benchmark publishes. What a benchmark leaves open is a choice of ours, and the
mode's `caveats` say so; they are written into every report.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import quoted
from trainer.evaluation_errors import PromptSetError
from trainer.evaluation_prompts import (
    DEFAULT_PROMPTS,
    Prompt,
    PromptSet,
    read_lines,
    read_prompts,
    unique,
)

# A line of DreamBench's prompts_and_classes.txt, which is Python: 'a {0} {1} ...'.format(...)
_DREAMBENCH_LINE = re.compile(r"\s*'([^']*)'\.format\(.*\),?\s*")
_DREAMBENCH_SLOTS = "{0} {1}"  # unique token and class; a learned word stands for both
_DREAMBENCH_LISTS = {"dreambench-object": "Object Prompts", "dreambench-live": "Live Subject"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkMode:
    """The conventions of one benchmark. Drawing options are defaults that flags may change."""

    name: str
    image_measure: str  # what it calls image similarity (trainer.evaluation_measures)
    text_measure: str
    num_samples: int  # pictures a prompt, for each seed
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    caveats: tuple[str, ...]
    prompt_file: str = ""  # what --prompts must name; "" where there is a default set


_DREAMBENCH = BenchmarkMode(
    name="",
    image_measure="image_similarity_all_prompts",
    text_measure="text_similarity_class_word",
    num_samples=4,
    sampler="ddim",
    num_inference_steps=50,
    guidance_scale=7.5,
    caveats=(
        "DreamBench's prompts hold a token and the class word; here the learned word stands for "
        "both when drawing, and the class word alone when the text is scored",
        "published DINO figures are of ViT-S/16 (DINO, not DINOv2), CLIP figures of the CLIP that "
        "each paper names; other encoders give other numbers",
        "sampler, steps and guidance are not part of DreamBench; these are a choice",
    ),
    prompt_file="prompts_and_classes.txt of github.com/google/dreambooth",
)

MODES = {
    mode.name: mode
    for mode in (
        BenchmarkMode(
            name="paper",
            image_measure="image_similarity",
            text_measure="text_similarity",
            num_samples=8,
            sampler="ddim",
            num_inference_steps=50,
            guidance_scale=5.0,
            caveats=(
                "the paper drew 64 pictures a prompt, and measured with CLIP ViT-B/32; with fewer, "
                "or another encoder, numbers are not its numbers",
                "the paper's text says cosine with the mean embedding, its code averages cosines; "
                "the figure shows the latter, both are in the table",
                "text similarity leaves the word out and does not notice a forgotten subject",
            ),
        ),
        *(dataclasses.replace(_DREAMBENCH, name=name) for name in _DREAMBENCH_LISTS),
        BenchmarkMode(
            name="customconcept101",
            image_measure="image_similarity_all_prompts",
            text_measure="clip_score_class_word",
            num_samples=4,
            sampler="ddpm",
            num_inference_steps=50,
            guidance_scale=6.0,
            caveats=(
                "CLIP-T is 2.5 max(cosine, 0): divide by 2.5 before comparing it with a cosine",
                "the benchmark measures with CLIP ViT-B/32 and DINO ViT-S/16, on 50 or 200 DDPM "
                "steps; the number of pictures a prompt and the guidance here are a choice",
                "its code normalizes in float16 below numpy 1.21, and warns that this differs a "
                "little; here it is float64",
            ),
            prompt_file="the concept's file in customconcept101/prompts of "
            "github.com/adobe-research/custom-diffusion",
        ),
    )
}


def prompts_of_mode(mode: BenchmarkMode, path: Path | None) -> PromptSet:
    """The prompts of a file as the mode reads it, or the default set.

    Raises `PromptSetError` for a file that is missing, broken, or not the benchmark's.
    """
    if path is None and mode.prompt_file:
        raise PromptSetError(
            f"--benchmark {mode.name} has the benchmark's own prompts, which come with its data; "
            f"name {mode.prompt_file} with --prompts"
        )
    if path is None:
        return DEFAULT_PROMPTS
    if mode.name in _DREAMBENCH_LISTS and path.suffix == ".txt":
        return _read_dreambench(path, _DREAMBENCH_LISTS[mode.name])
    return read_prompts(path)


def _read_dreambench(path: Path, heading: str) -> PromptSet:
    """The list below a heading of prompts_and_classes.txt; nothing of it is executed."""
    prompts: list[Prompt] = []
    inside = False
    for number, line in enumerate(read_lines(path), start=1):
        if line.rstrip().endswith("Prompts"):
            inside = line.startswith(heading)
        elif inside and (match := _DREAMBENCH_LINE.fullmatch(line)):
            template = match[1].replace(_DREAMBENCH_SLOTS, "{}")
            try:
                prompts.append(Prompt(template=template))
            except PromptSetError as error:
                raise PromptSetError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise PromptSetError(
            f"{path} has no list {quoted(heading)} of prompts; give {_DREAMBENCH.prompt_file}"
        )
    return PromptSet(source=f"{path}, {heading}", prompts=unique(prompts))
