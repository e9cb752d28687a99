"""The systems that are measured: this runtime, and diffusers as its users run it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.batching.batcher import Batcher, generate
from engine.concepts import Concept, write_concept
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "emoji"
BUNDLE = ROOT / "build" / "emoji"
PROMPT = "a photo of <x> on a blue background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One request: the same for every system."""

    seed: int
    num_inference_steps: int = 20
    guidance_scale: float = 4.0
    prompt: str = PROMPT


class Peer(Protocol):
    """A system that draws."""

    name: str

    def draw(self, works: Sequence[Work]) -> list[np.ndarray]:
        """Images [height, width, 3] in [0, 1], all requests in one batch."""
        ...


def example_concept(dim: int, seed: int = 0) -> Concept:
    """A word of one vector, as long as the vocabulary's are."""
    vector = np.random.default_rng(seed).normal(0, 1, (1, dim)).astype(np.float32)
    return Concept(
        placeholder_token="<x>", learned_embeddings=0.23 * vector / np.linalg.norm(vector)
    )


class OneWord:
    """The runtime in this process: bundle, ONNX Runtime on the CPU, batcher."""

    name = "oneword"

    def __init__(self) -> None:
        self.pipeline = Pipeline.open(BUNDLE)
        self.batcher = Batcher(self.pipeline)
        self.concept = example_concept(self.pipeline.bundle.manifest.text.dim)

    def request(self, work: Work) -> GenerationRequest:
        return GenerationRequest(
            prompt=work.prompt,
            concepts=(self.concept,),
            seed=work.seed,
            sampler="ddim",
            num_inference_steps=work.num_inference_steps,
            guidance_scale=work.guidance_scale,
        )

    def draw(self, works: Sequence[Work]) -> list[np.ndarray]:
        drawn = [generate(self.batcher, self.pipeline.plan(self.request(work))) for work in works]
        return [images[0].image / 255.0 for images, _ in drawn]

    def close(self) -> None:
        self.batcher.close()


class Diffusers:
    """`StableDiffusionPipeline`, eager, float32, with the concept loaded beforehand."""

    name = "diffusers eager"

    def __init__(self, folder: Path) -> None:
        import torch
        from diffusers import StableDiffusionPipeline

        self._torch = torch
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(
            MODEL, safety_checker=None, torch_dtype=torch.float32
        )
        self.pipe.set_progress_bar_config(disable=True)
        path = folder / "learned_embeds.safetensors"
        write_concept(example_concept(self.pipe.text_encoder.config.hidden_size), path, "diffusers")
        self.pipe.load_textual_inversion(str(path))

    def draw(self, works: Sequence[Work]) -> list[np.ndarray]:
        first = works[0]
        generators = [self._torch.Generator("cpu").manual_seed(work.seed) for work in works]
        return list(
            self.pipe(
                [work.prompt for work in works],
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                generator=generators,
                output_type="np",
            ).images
        )
