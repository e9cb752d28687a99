"""How faithful and how editable each point of a run's course is, on a few pictures of each.

The measures are those of `oneword evaluate` (docs/evaluation.md) on a smaller set: 4 pictures of
the word alone and 8 of it on other backgrounds, on the same noise for every point, 12 steps each.
That is 288 rows of the denoiser a point; a training step of 8 samples takes about as long as 24.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from engine.concepts import Concept
from engine.requests import RgbImage
from trainer import scores
from trainer.course import Course, CoursePoint
from trainer.encoders import Encoder
from trainer.evaluation_errors import EvaluationError
from trainer.evaluation_prompts import DEFAULT_PROMPTS, Prompt
from trainer.evaluation_subjects import as_pictures
from trainer.images import TrainingImages
from trainer.model import DiffusionModel
from trainer.sampling import image_size, sample_images
from trainer.templates import LearnableProperty
from trainer.tradeoff import Preference, TradeOffPoint, choose, pareto_front

LIKENESS_SAMPLES, EDITED_SAMPLES = 4, 2  # pictures of a prompt
NUM_INFERENCE_STEPS = 12
_STYLED = ("a cat", "a house", "an apple", "a car")  # that the embedded model knows


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgePrompts:
    """What is drawn of a point: the word alone, and the word asked for something else."""

    likeness: tuple[Prompt, ...]
    edited: tuple[Prompt, ...]

    @classmethod
    def for_property(cls, learnable_property: LearnableProperty) -> "JudgePrompts":
        if learnable_property == "style":
            return cls(
                likeness=(Prompt(template="a painting in the style of {}"),),
                edited=tuple(Prompt(template=f"{one} in the style of {{}}") for one in _STYLED),
            )
        prompts = DEFAULT_PROMPTS.prompts
        return cls(
            likeness=tuple(prompt for prompt in prompts if prompt.kind == "likeness"),
            edited=tuple(prompt for prompt in prompts if prompt.kind == "background"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CourseJudge:
    """One encoder's eye for the word of some training images."""

    encoder: Encoder
    prompts: JudgePrompts
    training: Float[np.ndarray, "images dim"]
    texts: Float[np.ndarray, "edited_prompts dim"]  # the word left out

    @classmethod
    def of(
        cls, encoder: Encoder, images: TrainingImages, learnable_property: LearnableProperty
    ) -> "CourseJudge":
        """Raises `EvaluationError` for an encoder that reads no text, or not these images."""
        if not encoder.description.reads_text:
            raise EvaluationError(
                f"--encoder {encoder.description.name} reads no text, so it cannot say how "
                "editable a word is; use a CLIP, or the embedded model's evaluator"
            )
        prompts = JudgePrompts.for_property(learnable_property)
        return cls(
            encoder=encoder,
            prompts=prompts,
            training=encoder.image_embeds(as_pictures(images)),
            texts=encoder.text_embeds([prompt.with_word("") for prompt in prompts.edited]),
        )

    def judge(self, model: DiffusionModel, concept: Concept, *, label: str) -> TradeOffPoint:
        """Draw a concept and measure it. Raises `EvaluationError` for pictures without sense."""
        token = concept.placeholder_token
        likeness = self._drawn(model, concept, self.prompts.likeness, LIKENESS_SAMPLES, token)
        edited = self._drawn(model, concept, self.prompts.edited, EDITED_SAMPLES, token)
        return TradeOffPoint(
            label=label,
            image_similarity=scores.mean_of_cosines(
                likeness.reshape(-1, likeness.shape[-1]), self.training
            ),
            text_similarity=float(scores.paired_cosines(edited, self.texts).mean()),
        )

    def _drawn(
        self,
        model: DiffusionModel,
        concept: Concept,
        prompts: Sequence[Prompt],
        num_samples: int,
        token: str,
    ) -> Float[np.ndarray, "prompts samples dim"]:
        """Embeddings of pictures; sample i of each call has the noise of seed i."""
        pictures: list[list[RgbImage]] = []
        for seed in range(num_samples):
            drawn = sample_images(
                model,
                [concept],
                [prompt.with_word(token) for prompt in prompts],
                size=image_size(model),
                seed=seed,
                num_inference_steps=NUM_INFERENCE_STEPS,
            )
            pictures.append([np.asarray(image) for image in drawn])
        embeds = np.stack([self.encoder.image_embeds(of_seed) for of_seed in pictures])
        return embeds.swapaxes(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCourse:
    """The points of a course with their measures, and the one that is preferred."""

    course: Course
    measures: tuple[TradeOffPoint, ...]  # of each point
    prefer: Preference
    encoder: str

    @property
    def chosen(self) -> CoursePoint:
        return self.course[self.measures.index(choose(self._learned, self.prefer))]

    @property
    def front(self) -> tuple[TradeOffPoint, ...]:
        return pareto_front(self._learned)

    @property
    def _learned(self) -> tuple[TradeOffPoint, ...]:
        # Before its first step a run has learned nothing, and is most editable for that reason.
        return tuple(m for m, point in zip(self.measures, self.course, strict=True) if point.step)

    def table(self) -> str:
        """One line a point; those of the Pareto front and the chosen one are marked."""
        lines = [f"{'step':>7} {'evaluation loss':>16} {'image sim.':>11} {'text sim.':>10}"]
        for point, measure in zip(self.course, self.measures, strict=True):
            lines.append(
                f"{point.step:>7} {point.evaluation_loss:>16.4f} {measure.image_similarity:>11.3f} "
                f"{measure.text_similarity:>10.3f}  {self._mark(point, measure)}".rstrip()
            )
        return "\n".join(lines)

    def _mark(self, point: CoursePoint, measure: TradeOffPoint) -> str:
        if not point.step:
            return "nothing learned yet"
        front = "front" if measure in self.front else ""
        return f"{front}, taken ({self.prefer})" if point is self.chosen else front

    def metadata(self) -> dict[str, str]:
        """For the concept file: [step, image similarity, text similarity] of each point."""
        points = [
            [point.step, round(measure.image_similarity, 4), round(measure.text_similarity, 4)]
            for point, measure in zip(self.course, self.measures, strict=True)
        ]
        front = {measure.label for measure in self.front}
        return {
            "prefer": self.prefer,
            "course_encoder": self.encoder,
            "course": json.dumps(points),
            "course_front": json.dumps([p.step for p in self.course if str(p.step) in front]),
        }


def judge_course(
    judge: CourseJudge,
    model: DiffusionModel,
    course: Course,
    concept_of: Callable[[CoursePoint], Concept],
    prefer: Preference,
    on_point: Callable[[], object],
) -> JudgedCourse:
    """Judge each point; `on_point` is told when one is done."""
    measures: list[TradeOffPoint] = []
    for point in course:
        measures.append(judge.judge(model, concept_of(point), label=str(point.step)))
        on_point()
    return JudgedCourse(
        course=course,
        measures=tuple(measures),
        prefer=prefer,
        encoder=judge.encoder.description.name,
    )
