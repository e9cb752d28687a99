"""The words of the API to the words of the runtime and back: pure functions without a server."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from engine.batching.batcher import ImageDone, StepDone, Timings
from engine.concepts import Concept, FileFormat, concept_from_bytes, concept_to_bytes
from engine.errors import ConceptUnreadable, InvalidRequest, PromptTooLong, UnknownConcept
from engine.images import ImageFormat, decode_image, encode_image
from engine.planner import GenerationPlan
from engine.prompt_syntax import MAX_PROMPT_CHARACTERS, named_placeholders
from engine.requests import MAX_SEED, GenerationRequest, Limits
from engine.store.concept_store import ConceptStore, StoredConcept
from protos.oneword.v1 import concepts_pb2, generation_pb2

# Python and PyTorch agree on noise by the low 32 bits of a seed: a random one needs no more.
_RANDOM_SEED_BITS = 32
_NAMES_IN_ERRORS = 5
# Fields with the same name and meaning in GenerateRequest and GenerationRequest.
_OPTIONAL_FIELDS = (
    "width",
    "height",
    "num_images",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "guidance_start",
    "guidance_end",
    "strength",
)
_IMAGE_FORMATS: dict[int, ImageFormat] = {
    generation_pb2.IMAGE_FORMAT_UNSPECIFIED: "png",
    generation_pb2.IMAGE_FORMAT_PNG: "png",
    generation_pb2.IMAGE_FORMAT_WEBP: "webp",
}
_CONCEPT_FORMATS: dict[int, FileFormat] = {
    concepts_pb2.CONCEPT_FORMAT_UNSPECIFIED: "oneword",
    concepts_pb2.CONCEPT_FORMAT_ONEWORD: "oneword",
    concepts_pb2.CONCEPT_FORMAT_DIFFUSERS: "diffusers",
}


def request_from_proto(
    message: generation_pb2.GenerateRequest,
    *,
    store: ConceptStore,
    limits: Limits,
    tenant: str,
    packed_concepts: Mapping[str, Concept] | None = None,
    default_seed: int | None = None,
) -> GenerationRequest:
    """Read a request: load the tenant's concepts, decode its image; take defaults for the rest.

    `packed_concepts` came with the model, by token: they are for every tenant, and a stored concept
    of the same name goes before. Without `default_seed` that of the seed is random.

    Ranges are checked later, by `engine.requests.check_request`.
    """
    fields = _numbers(message)
    if default_seed is None:
        default_seed = secrets.randbits(_RANDOM_SEED_BITS)
    fields.setdefault("seed", default_seed)
    if message.init_image:
        fields["init_image"] = decode_image(message.init_image, max_side=limits.max_side)
    elif message.HasField("strength"):
        raise InvalidRequest(
            "strength is for image-to-image; send init_image with it, or leave it out",
            field="strength",
        )
    return GenerationRequest(
        prompt=message.prompt,
        negative_prompt=message.negative_prompt,
        concepts=_concepts(message, _Finder(store, tenant, packed_concepts or {}), limits),
        preview_every=message.preview_every_steps,
        **fields,
    )


def outline_from_proto(
    message: generation_pb2.GenerateRequest, size_multiple: int
) -> GenerationRequest:
    """The numbers of a request, from which its cost follows; no text, concept or image is read.

    Of an initial image that is drawn at its own size the size is not known: the least stands there.
    """
    fields = _numbers(message)
    if message.init_image:
        fields["init_image"] = np.zeros((1, 1, 3), np.uint8)
        for side in ("width", "height"):
            fields.setdefault(side, size_multiple)
    return GenerationRequest(prompt="", preview_every=message.preview_every_steps, **fields)


def _numbers(message: generation_pb2.GenerateRequest) -> dict[str, Any]:
    """The fields of a request that need no reading, where they are set."""
    fields: dict[str, Any] = {
        name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)
    }
    if message.sampler:
        fields["sampler"] = message.sampler
    return fields


def _concepts(
    message: generation_pb2.GenerateRequest, finder: "_Finder", limits: Limits
) -> tuple[Concept, ...]:
    """The concepts referred to, then the stored ones that the prompts name as `<word>`."""
    _check_count(len(message.concepts), limits)
    # Before the prompts are searched: a message may hold megabytes of them.
    _check_length("prompt", message.prompt)
    _check_length("negative_prompt", message.negative_prompt)
    referred = [
        _resolve(reference, finder, limits, f"concepts[{index}]")
        for index, reference in enumerate(message.concepts)
    ]
    covered = {concept.placeholder_token for concept in referred}
    named = named_placeholders(f"{message.prompt}\n{message.negative_prompt}")
    missing = [token for token in named if token not in covered]
    _check_count(len(referred) + len(missing), limits)
    return (*referred, *(finder.by_token(token) for token in missing))


@dataclass(frozen=True, slots=True)
class _Finder:
    """The concepts that one tenant can name: its own, then those that came with the model."""

    store: ConceptStore
    tenant: str
    packed: Mapping[str, Concept]

    def by_token(self, token: str) -> Concept:
        try:
            return self.store.find_by_token(token, tenant=self.tenant)
        except UnknownConcept as error:
            if token in self.packed:
                return self.packed[token]
            raise self._described(error) from None

    def by_id(self, concept_id: str) -> Concept:
        try:
            return self.store.find_by_id(concept_id, tenant=self.tenant)
        except UnknownConcept as error:
            for concept in self.packed.values():
                if concept.concept_id == concept_id:
                    return concept
            raise self._described(error) from None

    def _described(self, error: UnknownConcept) -> UnknownConcept:
        if not self.packed:
            return error
        names = ", ".join(sorted(self.packed)[:_NAMES_IN_ERRORS])
        more = ", ..." if len(self.packed) > _NAMES_IN_ERRORS else ""
        return UnknownConcept(
            f"{error}; packed with the model: {names}{more}",
            placeholder_token=error.placeholder_token,
        )


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_concepts_per_request:
        raise InvalidRequest(
            f"a request may use {limits.max_concepts_per_request} concepts, this one has {count}",
            field="concepts",
        )


def _check_length(field: str, prompt: str) -> None:
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise PromptTooLong(
            f"{field} has {len(prompt)} characters, the limit is {MAX_PROMPT_CHARACTERS}; "
            "shorten it",
            field=field,
        )


def _resolve(
    reference: generation_pb2.ConceptReference,
    finder: "_Finder",
    limits: Limits,
    field: str,
) -> Concept:
    match reference.WhichOneof("source"):
        case "placeholder_token":
            return finder.by_token(reference.placeholder_token)
        case "concept_id":
            return finder.by_id(reference.concept_id)
        case "inline":
            try:
                return _inline_concept(reference.inline, limits, field)
            except ConceptUnreadable as error:
                error.field = field  # in the words of the request, whatever part of it is at fault
                raise
        case None:
            raise InvalidRequest(
                f"{field} is empty; give placeholder_token, concept_id or inline", field=field
            )


def _inline_concept(inline: generation_pb2.InlineConcept, limits: Limits, field: str) -> Concept:
    if (num_bytes := inline.ByteSize()) > limits.max_inline_concept_bytes:
        raise ConceptUnreadable(
            f"{field} has {num_bytes} bytes, a concept in a request at most "
            f"{limits.max_inline_concept_bytes}; import it with ConceptService.ImportConcept"
        )
    match inline.WhichOneof("content"):
        case "safetensors":
            return concept_from_bytes(
                inline.safetensors,
                source=field,
                placeholder_token=inline.placeholder_token or None,
            )
        case "learned_embeddings":
            return _bare_concept(inline.placeholder_token, inline.learned_embeddings, field)
        case None:
            raise ConceptUnreadable(
                f"{field} has no content; give safetensors or learned_embeddings"
            )


def _bare_concept(
    placeholder_token: str, message: generation_pb2.LearnedEmbeddings, field: str
) -> Concept:
    values = np.array(message.values, np.float32)
    rows = message.num_vectors if message.HasField("num_vectors") else 1
    if not rows or not values.size or values.size % rows:
        raise ConceptUnreadable(
            f"{field} has {values.size} values for {rows} vectors; "
            "give num_vectors x dim values, row after row"
        )
    return Concept(
        placeholder_token=placeholder_token,
        learned_embeddings=values.reshape(rows, -1),
        embedding_fingerprint=message.embedding_fingerprint,
    )


def pinned(
    message: generation_pb2.GenerateRequest, request: GenerationRequest
) -> generation_pb2.GenerateRequest:
    """The message with what it is understood as inside: seed, number of images, and vectors."""
    whole = generation_pb2.GenerateRequest()
    whole.CopyFrom(message)
    whole.seed, whole.num_images = request.seed, request.num_images
    del whole.concepts[:]
    for concept in request.concepts:
        whole.concepts.add().inline.safetensors = concept_to_bytes(concept)
    return whole


def image_format_from_proto(value: int) -> ImageFormat:
    """The format asked for; raises `InvalidRequest` for a number that this version lacks."""
    if value not in _IMAGE_FORMATS:
        raise InvalidRequest(
            f"unknown image_format {value}; known: {_enum_names(generation_pb2.ImageFormat)}",
            field="image_format",
        )
    return _IMAGE_FORMATS[value]


def concept_format_from_proto(value: int) -> FileFormat:
    """The format asked for; raises `InvalidRequest` for a number that this version lacks."""
    if value not in _CONCEPT_FORMATS:
        raise InvalidRequest(
            f"unknown format {value}; known: {_enum_names(concepts_pb2.ConceptFormat)}",
            field="format",
        )
    return _CONCEPT_FORMATS[value]


def _enum_names(enum: Any) -> str:
    return ", ".join(enum.keys()[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """The events of one request in the words of the API."""

    plan: GenerationPlan
    model_name: str
    image_format: ImageFormat

    def accepted(self, request_id: str, queue_position: int) -> generation_pb2.GenerateResponse:
        accepted = generation_pb2.Accepted(
            request_id=request_id,
            queue_position=queue_position,
            seed=self.plan.request.seed,
            **self._sampling(),
        )
        return generation_pb2.GenerateResponse(accepted=accepted)

    def progress(self, event: StepDone) -> generation_pb2.GenerateResponse:
        progress = generation_pb2.Progress(
            image_index=event.image_index,
            step=event.step,
            num_steps=event.num_steps,
            preview=None if event.preview is None else encode_image(event.preview),
        )
        return generation_pb2.GenerateResponse(progress=progress)

    def image(self, event: ImageDone) -> generation_pb2.GenerateResponse:
        parameters = image_parameters(self.plan, event.seed, self.model_name)
        webp = self.image_format == "webp"
        image = generation_pb2.ImageResult(
            image_index=event.image_index,
            seed=event.seed,
            image=encode_image(event.image, self.image_format, parameters),
            format=generation_pb2.IMAGE_FORMAT_WEBP if webp else generation_pb2.IMAGE_FORMAT_PNG,
            width=self.plan.width,
            height=self.plan.height,
        )
        return generation_pb2.GenerateResponse(image=image)

    def summary(self, timings: Timings) -> generation_pb2.GenerateResponse:
        plan = self.plan
        summary = generation_pb2.Summary(
            timings=_timings_to_proto(timings),
            matched_concepts=[_matched_to_proto(concept) for concept in plan.matched],
            seeds=[
                (plan.request.seed + index) % (MAX_SEED + 1)
                for index in range(plan.request.num_images)
            ],
            cut_prompt=plan.prompt_report.cut,
            cut_negative_prompt=plan.negative_report.cut if plan.negative_report else "",
            num_tokens=plan.prompt_report.num_tokens,
            num_chunks=plan.prompt_report.num_chunks,
            model_name=self.model_name,
            **self._sampling(),
        )
        return generation_pb2.GenerateResponse(summary=summary)

    def _sampling(self) -> dict[str, Any]:
        request = self.plan.request
        return {
            "sampler": request.sampler,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "guidance_start": request.guidance_start,
            "guidance_end": request.guidance_end,
            "width": self.plan.width,
            "height": self.plan.height,
        }


def image_parameters(plan: GenerationPlan, seed: int, model_name: str) -> dict[str, Any]:
    """What an image file says about itself: enough to make this one image again."""
    request = plan.request
    parameters: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "concepts": {c.placeholder_token: c.concept_id for c in plan.matched},
        "seed": seed,
        "sampler": request.sampler,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "width": plan.width,
        "height": plan.height,
        "model": model_name,
    }
    if (request.guidance_start, request.guidance_end) != (0.0, 1.0):
        parameters["guidance_interval"] = [request.guidance_start, request.guidance_end]
    if request.init_image is not None:
        parameters["strength"] = request.strength
    return parameters


def _timings_to_proto(timings: Timings) -> generation_pb2.Timings:
    return generation_pb2.Timings(
        queue_wait_ms=timings.queue_wait_ms,
        denoise_ms=timings.denoise_ms,
        decode_ms=timings.decode_ms,
        total_ms=timings.total_ms,
        denoiser_calls=timings.denoiser_calls,
        mean_batch_rows=timings.mean_batch_rows,
    )


def _matched_to_proto(concept: Concept) -> generation_pb2.MatchedConcept:
    return generation_pb2.MatchedConcept(
        placeholder_token=concept.placeholder_token,
        concept_id=concept.concept_id,
        num_vectors=concept.num_vectors,
        version=concept.version,
    )


def timestamp_to_proto(seconds: float) -> Timestamp:
    """Seconds since the epoch, UTC, to the microsecond."""
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(seconds * 1e6))
    return timestamp


def concept_to_proto(
    stored: StoredConcept, aliases: Sequence[str], concept: Concept | None = None
) -> concepts_pb2.Concept:
    """Describe a stored concept; with its metadata where the loaded `concept` is given."""
    retired = stored.retired_time
    return concepts_pb2.Concept(
        placeholder_token=stored.placeholder_token,
        concept_id=stored.concept_id,
        num_vectors=stored.num_vectors,
        dim=stored.dim,
        embedding_fingerprint=stored.embedding_fingerprint,
        import_time=timestamp_to_proto(stored.import_time),
        metadata=dict(concept.metadata) if concept else {},
        version=stored.version,
        etag=stored.etag,
        aliases=aliases,
        num_bytes=stored.num_bytes,
        file_sha256=stored.file_sha256,
        delete_time=None if retired is None else timestamp_to_proto(retired),
    )
