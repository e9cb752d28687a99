"""Planning: the host work of a request, done before a model is called. No graph is loaded here."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from engine.bundle import Bundle
from engine.concepts import Concept, check_fits
from engine.guidance import GuidedCalls
from engine.images import resize
from engine.packed import read_packed_concepts
from engine.prompts import NOTHING_READ, EncoderInput, PromptReader, PromptReport
from engine.requests import MAX_SEED, GenerationRequest, Limits, RgbImage, check_request
from engine.samplers import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """One prompt as a text encoder takes it: one row per chunk."""

    inputs_embeds: Float32[np.ndarray, "chunks tokens dim"]
    eos_index: Int64[np.ndarray, " chunks"]
    weights: Float32[np.ndarray, "chunks tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingTask:
    """What a model must know to draw the images of a request: numbers alone, and no words.

    It can therefore cross to another process (`engine.worker.task_wire`); the prompt stays here.
    """

    seed: int
    num_images: int  # image i uses seed + i
    width: int  # pixels
    height: int
    trajectory: Trajectory
    texts: tuple[tuple[TextRows, ...], ...]  # by text encoder; one per row of the denoiser
    weights: tuple[float, ...]  # guidance: one per row, summing to 1
    guided_calls: GuidedCalls  # the others have the last row alone, the prompt's
    zero_negative: bool = False  # the first row's text is zeros
    init_image: RgbImage | None = None  # of this width and height

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image; the largest one is followed by 0."""
        return tuple((self.seed + index) % (MAX_SEED + 1) for index in range(self.num_images))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """A checked request: all that can be known before the model is called."""

    request: GenerationRequest
    width: int  # pixels
    height: int
    trajectory: Trajectory
    texts: tuple[tuple[EncoderInput, ...], ...]  # by text encoder; one per row of the denoiser
    weights: tuple[float, ...]  # guidance: one per row, summing to 1
    prompt_report: PromptReport
    negative_report: PromptReport | None  # None where guidance is off
    guided: GuidedCalls | None = None  # None: all of them
    zero_negative: bool = False  # the first row's text is zeros

    @property
    def guided_calls(self) -> GuidedCalls:
        """The denoiser calls of an image that have all of its rows."""
        return self.guided or GuidedCalls(0, len(self.trajectory.rows))

    @property
    def matched(self) -> tuple[Concept, ...]:
        """The concepts that the prompts use, each once."""
        reports = [r for r in (self.prompt_report, self.negative_report) if r]
        return tuple({c.placeholder_token: c for r in reports for c in r.matched}.values())

    @property
    def task(self) -> DenoisingTask:
        """The part that the model needs."""
        return DenoisingTask(
            seed=self.request.seed,
            num_images=self.request.num_images,
            width=self.width,
            height=self.height,
            trajectory=self.trajectory,
            texts=tuple(tuple(_rows(text) for text in texts) for texts in self.texts),
            weights=self.weights,
            guided_calls=self.guided_calls,
            zero_negative=self.zero_negative,
            init_image=self.request.init_image,
        )


class Planner:
    """The half of a model that needs no graph: tokenizers, embeddings and sampler tables."""

    def __init__(self, bundle: Bundle, *, limits: Limits) -> None:
        self.bundle = bundle
        self.limits = limits.for_model(bundle.manifest)
        self.packed_concepts = read_packed_concepts(bundle)
        self._readers = tuple(
            PromptReader(one.tokenizer, one.token_embedding, one.text, encoder=index)
            for index, one in enumerate(bundle.vocabularies)
        )

    @property
    def reader(self) -> PromptReader:
        """The reader of the first text encoder, whose reports are told."""
        return self._readers[0]

    def plan(self, request: GenerationRequest) -> GenerationPlan:
        """Check a request and do all host work; raises what the caller can mend."""
        outline, manifest = self.outline(request), self.bundle.manifest
        for concept in request.concepts:
            check_fits(
                concept,
                manifest.text,
                text_2=manifest.text_2,
                model_name=manifest.model_name,
            )
        texts = [_read(reader, request) for reader in self._readers]
        num_chunks = max(text.report.num_chunks for rows in texts for text in rows)
        *negative, prompt = texts[0]
        return dataclasses.replace(
            outline,
            request=_fitted(request, outline.width, outline.height),
            texts=tuple(
                tuple(reader.pad(text, num_chunks) for text in rows)
                for reader, rows in zip(self._readers, texts, strict=True)
            ),
            prompt_report=prompt.report,
            negative_report=negative[0].report if negative else None,
        )

    def outline(self, request: GenerationRequest) -> GenerationPlan:
        """The plan but for its texts: what a request costs is known from it, in microseconds.

        Raises `InvalidRequest` for what is wrong with the numbers of a request.
        """
        width, height, trajectory = check_request(
            request,
            manifest=self.bundle.manifest,
            samplers=self.bundle.sampler_tables,
            limits=self.limits,
        )
        scale = request.guidance_scale
        guided = scale != 1.0
        return GenerationPlan(
            request=request,
            width=width,
            height=height,
            trajectory=trajectory,
            texts=(),
            weights=(1.0 - scale, scale) if guided else (1.0,),
            prompt_report=NOTHING_READ,
            negative_report=None,
            guided=GuidedCalls.between(
                request.guidance_start, request.guidance_end, len(trajectory.rows)
            ),
            zero_negative=guided
            and self.bundle.manifest.zero_empty_negative
            and not request.negative_prompt,
        )


def _rows(text: EncoderInput) -> TextRows:
    return TextRows(
        inputs_embeds=text.inputs_embeds, eos_index=text.eos_index, weights=text.weights
    )


def _read(reader: PromptReader, request: GenerationRequest) -> tuple[EncoderInput, ...]:
    """The prompts of a request as one text encoder reads them; the negative one first, if any."""
    prompt = reader.read(request.prompt, request.concepts)
    if request.guidance_scale == 1.0:
        return (prompt,)
    negative = reader.read(request.negative_prompt, request.concepts, field="negative_prompt")
    return (negative, prompt)


def _fitted(request: GenerationRequest, width: int, height: int) -> GenerationRequest:
    """The request with its initial image at the size of use, for a plan may wait long."""
    if request.init_image is None:
        return request
    return dataclasses.replace(request, init_image=resize(request.init_image, width, height))
