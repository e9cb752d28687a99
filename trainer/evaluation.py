"""The paper's quantitative section: draw, encode, compare (arXiv 2208.01618, section 5).

Every concept is drawn with every prompt and seed; beside it, on the same noise, the references:
the class word in its place, nothing in its place, and the empty prompt. Pictures are encoded as
they come and dropped, so memory does not grow with their number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from engine.concepts import Concept
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest, RgbImage
from trainer.encoders import Encoder
from trainer.evaluation_drawing import MAX_SAMPLES, MAX_SEED, checked_plan, draw, noise_seed
from trainer.evaluation_errors import EvaluationError
from trainer.evaluation_measures import Yardsticks, measure, measure_training_images
from trainer.evaluation_prompts import PromptSet
from trainer.evaluation_report import Drawing, Judged, Role
from trainer.evaluation_subjects import Subject
from trainer.scores import Spread, spread

Samples = Float64[np.ndarray, "seeds prompts samples dim"]
OnPictures = Callable[[int], object]  # told how many pictures were just drawn
_References = tuple[str, ...]  # prompts without a concept: what a shared reference is known by


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingOptions:
    """How to draw; flags of `oneword evaluate` carry these names."""

    sampler: str
    num_inference_steps: int
    guidance_scale: float
    num_samples: int
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            raise EvaluationError(
                f"--num-samples must be between 1 and {MAX_SAMPLES}, got {self.num_samples}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise EvaluationError(
                f"--seeds must be different numbers, at least one, got {list(self.seeds)}"
            )
        if wrong := [seed for seed in self.seeds if not 0 <= seed <= MAX_SEED]:
            raise EvaluationError(f"--seeds must be between 0 and {MAX_SEED}, got {wrong[0]}")


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Something to draw: what stands where the word goes."""

    prompts: tuple[str, ...]
    concept: Concept | None = None


class Evaluation:
    """One model, one set of prompts, some encoders: judges concepts one after the other."""

    def __init__(
        self,
        pipeline: Pipeline,
        encoders: Sequence[Encoder],
        prompts: PromptSet,
        options: DrawingOptions,
    ) -> None:
        self._pipeline = pipeline
        self._encoders = {encoder.description.name: encoder for encoder in encoders}
        self._prompts = prompts
        self._options = options
        # References that several concepts share are drawn once.
        self._references: dict[_References, dict[str, Samples]] = {}

    def drawing(self, bundle: str) -> Drawing:
        """How pictures are drawn, for the report."""
        manifest, options = self._pipeline.bundle.manifest, self._options
        return Drawing(
            model_name=manifest.model_name,
            bundle=bundle,
            embedding_fingerprint=manifest.text.embedding_fingerprint,
            width=manifest.latents.default_size,
            height=manifest.latents.default_size,
            sampler=options.sampler,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            num_samples=options.num_samples,
            seeds=options.seeds,
        )

    def num_pictures(self, subjects: Sequence[Subject]) -> int:
        """How many pictures `judge` will draw for these, references included."""
        class_words = {subject.class_word for subject in subjects if subject.class_word}
        sets = len(subjects) + len(class_words) + 1
        each = self._options.num_samples * len(self._options.seeds)
        return (sets * len(self._prompts.prompts) + 1) * each

    def check(self, subjects: Sequence[Subject]) -> None:
        """Everything that can be refused before the first picture is drawn, is."""
        for subject in subjects:
            references = [_Drawn(prompts) for _, prompts in self._reference_prompts(subject)]
            for drawn in (self._of_concept(subject), *references):
                for request in self._requests(drawn):
                    checked_plan(self._pipeline, request)
            self._yardsticks(subject)

    def judge(
        self, subject: Subject, on_pictures: OnPictures = lambda _count: None
    ) -> list[Judged]:
        """The concept, then its references."""
        yardsticks = self._yardsticks(subject)
        samples = self._draw(self._of_concept(subject), on_pictures)
        judged = [self._judged(subject, "concept", samples, yardsticks)]
        judged.append(self._training_images(subject, yardsticks))
        for role, reference in self._reference_prompts(subject):
            if reference not in self._references:
                self._references[reference] = self._draw(_Drawn(reference), on_pictures)
            judged.append(self._judged(subject, role, self._references[reference], yardsticks))
        return judged

    def _of_concept(self, subject: Subject) -> _Drawn:
        token = subject.concept.placeholder_token
        prompts = tuple(prompt.with_word(token) for prompt in self._prompts.prompts)
        return _Drawn(prompts, subject.concept)

    def _reference_prompts(self, subject: Subject) -> list[tuple[Role, _References]]:
        prompts = self._prompts.prompts
        found: list[tuple[Role, _References]] = []
        if subject.class_word:
            with_class = tuple(prompt.with_class(subject.class_word) for prompt in prompts)
            found.append(("class word", with_class))
        found.append(("word left out", self._prompts.texts))
        found.append(("random images", ("",)))
        return found

    def _requests(self, drawn: _Drawn) -> list[GenerationRequest]:
        """Seed after seed, prompt after prompt."""
        options = self._options
        return [
            GenerationRequest(
                prompt=prompt,
                concepts=(drawn.concept,) if drawn.concept else (),
                num_images=options.num_samples,
                seed=noise_seed(seed, place),
                sampler=options.sampler,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
            )
            for seed in options.seeds
            for place, prompt in enumerate(drawn.prompts)
        ]

    def _draw(self, drawn: _Drawn, on_pictures: OnPictures) -> dict[str, Samples]:
        """Embeddings by encoder; pictures of one prompt serve for all, if there is but one."""
        requests = self._requests(drawn)
        embeds: dict[str, dict[int, np.ndarray]] = {name: {} for name in self._encoders}
        for place, pictures in draw(self._pipeline, requests):
            for name, encoder in self._encoders.items():
                embeds[name][place] = encoder.image_embeds(pictures)
            on_pictures(len(pictures))
        shape = (len(self._options.seeds), len(drawn.prompts), self._options.num_samples)
        every = len(self._prompts.prompts)
        return {
            name: _repeated(_stacked(found, len(requests), shape), every)
            for name, found in embeds.items()
        }

    def _yardsticks(self, subject: Subject) -> dict[str, Yardsticks]:
        places = self._prompts.text_places
        texts = [self._prompts.texts[place] for place in places]
        word = subject.class_word
        class_texts = [self._prompts.prompts[place].with_class(word) for place in places if word]
        return {
            name: _yardsticks(encoder, subject, texts, class_texts)
            for name, encoder in self._encoders.items()
        }

    def _judged(
        self,
        subject: Subject,
        role: Role,
        samples: dict[str, Samples],
        yardsticks: dict[str, Yardsticks],
    ) -> Judged:
        measures = {
            name: _over_seeds([measure(one, self._prompts, yardsticks[name]) for one in of_encoder])
            for name, of_encoder in samples.items()
        }
        return _judged(subject, role, measures)

    def _training_images(self, subject: Subject, yardsticks: dict[str, Yardsticks]) -> Judged:
        found = {name: measure_training_images(of) for name, of in yardsticks.items()}
        measures = {name: _over_seeds([values]) for name, values in found.items()}
        return _judged(subject, "training images", measures)


def _yardsticks(
    encoder: Encoder, subject: Subject, texts: Sequence[str], class_texts: Sequence[str]
) -> Yardsticks:
    def embeds(pictures: Sequence[RgbImage]) -> np.ndarray | None:
        return encoder.image_embeds(pictures) if pictures else None

    reads_text = encoder.description.reads_text
    return Yardsticks(
        training=encoder.image_embeds(subject.training.pictures),
        masked=embeds(subject.training.without_background),
        texts=encoder.text_embeds(texts) if reads_text else None,
        class_texts=encoder.text_embeds(class_texts) if reads_text and class_texts else None,
    )


def _stacked(found: dict[int, np.ndarray], count: int, shape: tuple[int, int, int]) -> Samples:
    stacked = np.stack([found[place] for place in range(count)]).astype(np.float64)
    return stacked.reshape(*shape, stacked.shape[-1])


def _repeated(samples: Samples, num_prompts: int) -> Samples:
    """The empty prompt's pictures stand beside every prompt; others are as many as prompts."""
    seeds, _, per_prompt, dim = samples.shape
    return np.broadcast_to(samples, (seeds, num_prompts, per_prompt, dim))


def _over_seeds(values: Sequence[dict[str, float]]) -> dict[str, Spread]:
    return {name: spread([of_seed[name] for of_seed in values]) for name in values[0]}


def _judged(subject: Subject, role: Role, measures: dict[str, dict[str, Spread]]) -> Judged:
    is_concept = role == "concept"
    return Judged(
        label=subject.label,
        role=role,
        measures=measures,
        source=subject.source if is_concept else "",
        placeholder_token=subject.concept.placeholder_token if is_concept else "",
        concept_id=subject.concept.concept_id if is_concept else "",
        class_word=subject.class_word,
        training_images=subject.training.names,
        masked_images=len(subject.training.without_background),
        learned_with=dict(subject.concept.metadata) if is_concept else {},
    )
