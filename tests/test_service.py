"""The services over a real gRPC server and channel: what is streamed, refused, dropped and kept."""

import asyncio
import gc
import io
import logging
import pickle
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from PIL import Image
from safetensors.numpy import save as save_safetensors

import engine.errors
from engine.batcher import BatcherConfig, ImageDone, StepDone
from engine.concepts import Concept, concept_from_bytes, concept_to_bytes
from engine.errors import EngineError
from engine.images import read_parameters
from engine.requests import GenerationRequest, Limits
from engine.server import Server, ServerConfig
from engine.status import STATUS, status_of
from engine.store import ConceptStore, StoredConcept
from engine.streams import MAX_WAITING_STEPS, EventStream
from protos.oneword.v1 import concepts_pb2, generation_pb2, server_info_pb2
from protos.oneword.v1.concepts_pb2_grpc import ConceptServiceStub
from protos.oneword.v1.generation_pb2 import GenerateRequest, GenerateResponse
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub
from protos.oneword.v1.server_info_pb2_grpc import ServerInfoServiceStub
from tests.fakes import DIM, WAIT_S, FakeDenoiser, make_pipeline

DEFAULTS = GenerationRequest(prompt="")
SMALL_LIMITS = Limits(max_concepts_per_request=4)


@dataclass(kw_only=True)
class Harness:
    """A server in this process, and stubs that call it through a socket."""

    server: Server
    denoiser: FakeDenoiser
    store: ConceptStore
    address: str
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation = ImageGenerationServiceStub(self.channel)
        self.concepts = ConceptServiceStub(self.channel)
        self.info = ServerInfoServiceStub(self.channel)

    async def generate(self, *, timeout: float = WAIT_S, **fields: Any) -> list[GenerateResponse]:
        fields = {"num_inference_steps": 4, **fields}
        call = self.generation.Generate(GenerateRequest(**fields), timeout=timeout)
        return [response async for response in call]

    async def refusal(self, **fields: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(**fields)
        return caught.value

    async def is_idle(self) -> bool:
        for _ in range(200):
            if self.server.batcher.load == (0, 0) and self.server.generation.active == 0:
                return True
            await asyncio.sleep(0.01)
        return False


StartServer = Callable[..., Any]


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    harnesses: list[Harness] = []

    async def start(**settings: Any) -> Harness:
        limits = settings.pop("limits", SMALL_LIMITS)
        config = ServerConfig(bundle=Path("none"), listen="127.0.0.1:0", **settings)
        denoiser, store = FakeDenoiser(), ConceptStore.temporary()
        server = Server(make_pipeline(denoiser, limits=limits), store, config)
        address = await server.start()
        options = [("grpc.max_receive_message_length", config.max_message_bytes)]
        channel = grpc.aio.insecure_channel(address, options=options)
        harness = Harness(
            server=server, denoiser=denoiser, store=store, address=address, channel=channel
        )
        harnesses.append(harness)
        return harness

    yield start
    for harness in harnesses:
        harness.denoiser.gate.set()
        await harness.channel.close()
        await harness.server.stop()


@pytest.fixture
async def served(start_server: StartServer) -> Harness:
    return await start_server()


def make_concept(token: str = "<cat-toy>", value: float = 0.5, **fields: Any) -> Concept:
    fields = {"learned_embeddings": np.full((2, DIM), value, np.float32), **fields}
    return Concept(placeholder_token=token, **fields)


def inline(content: bytes, token: str = "") -> generation_pb2.ConceptReference:
    concept = generation_pb2.InlineConcept(safetensors=content, placeholder_token=token)
    return generation_pb2.ConceptReference(inline=concept)


def bare(token: str, values: list[float], **fields: Any) -> generation_pb2.ConceptReference:
    vectors = generation_pb2.LearnedEmbeddings(values=values, **fields)
    concept = generation_pb2.InlineConcept(placeholder_token=token, learned_embeddings=vectors)
    return generation_pb2.ConceptReference(inline=concept)


async def first_response(call: Any) -> GenerateResponse:
    response = await call.read()
    assert isinstance(response, GenerateResponse)
    return response


def kinds(responses: list[GenerateResponse]) -> list[str]:
    return [response.WhichOneof("event") or "" for response in responses]


def images(responses: list[GenerateResponse]) -> list[generation_pb2.ImageResult]:
    found = [response.image for response in responses if response.HasField("image")]
    return sorted(found, key=lambda image: image.image_index)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The details of a refusal by the name of their type."""
    metadata = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            status = Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details())
            return {
                any_.TypeName(): getattr(
                    error_details_pb2, any_.TypeName().split(".")[-1]
                ).FromString(any_.value)
                for any_ in status.details
            }
    raise AssertionError("no details")


def field_of(error: grpc.aio.AioRpcError) -> str:
    """The field that a refusal of the request names."""
    (violation,) = details(error)["google.rpc.BadRequest"].field_violations
    return violation.field


# Streams


async def test_events_come_in_order_and_the_summary_is_last(served: Harness) -> None:
    responses = await served.generate(prompt="a photo of cat", num_images=2, seed=7)
    order = kinds(responses)
    assert order[0] == "accepted" and order[-1] == "summary"
    assert order.count("progress") == 8 and order.count("image") == 2
    for index in range(2):
        own = [r for r in responses if r.HasField("progress") and r.progress.image_index == index]
        assert [(r.progress.step, r.progress.num_steps) for r in own] == [
            (step, 4) for step in range(1, 5)
        ]
        image = next(r for r in responses if r.HasField("image") and r.image.image_index == index)
        assert responses.index(image) > responses.index(own[-1])
        assert (image.image.seed, image.image.format) == (
            7 + index,
            generation_pb2.IMAGE_FORMAT_PNG,
        )
        assert pixels(image.image.image).shape == (64, 64, 3)


async def test_what_is_absent_takes_the_runtimes_default_and_is_reported(served: Harness) -> None:
    call = served.generation.Generate(GenerateRequest(prompt="a cat"), timeout=WAIT_S)
    responses = [response async for response in call]
    accepted, summary = responses[0].accepted, responses[-1].summary
    for message in (accepted, summary):
        assert message.sampler == DEFAULTS.sampler
        assert message.num_inference_steps == DEFAULTS.num_inference_steps
        assert message.guidance_scale == DEFAULTS.guidance_scale
        assert (message.width, message.height) == (64, 64)
    assert list(summary.seeds) == [accepted.seed]
    assert summary.model_name == "fake"
    assert (summary.num_tokens, summary.num_chunks, summary.cut_prompt) == (2, 1, "")


async def test_the_random_seed_is_reported_and_makes_the_same_image_again(served: Harness) -> None:
    first = await served.generate(prompt="a cat")
    second = await served.generate(prompt="a cat")
    again = await served.generate(prompt="a cat", seed=first[0].accepted.seed)
    assert first[0].accepted.seed != second[0].accepted.seed
    assert images(first)[0].image == images(again)[0].image
    assert images(first)[0].image != images(second)[0].image


async def test_seed_zero_and_the_largest_seed_are_seeds(served: Harness) -> None:
    assert (await served.generate(seed=0))[0].accepted.seed == 0
    responses = await served.generate(seed=2**64 - 1, num_images=2)
    assert list(responses[-1].summary.seeds) == [2**64 - 1, 0]
    assert [image.seed for image in images(responses)] == [2**64 - 1, 0]


async def test_previews_come_as_asked(served: Harness) -> None:
    responses = await served.generate(num_inference_steps=6, preview_every_steps=2)
    progress = [r.progress for r in responses if r.HasField("progress")]
    previews = {p.step: p.preview for p in progress if p.HasField("preview")}
    assert sorted(previews) == [2, 4]  # not the last step, whose image follows
    assert pixels(previews[2]).shape == (8, 8, 3)  # one pixel for each latent


async def test_a_file_says_how_it_was_made(served: Harness) -> None:
    served.store.import_concept(make_concept())
    for image_format, name in (
        (generation_pb2.IMAGE_FORMAT_PNG, "PNG"),
        (generation_pb2.IMAGE_FORMAT_WEBP, "WEBP"),
    ):
        responses = await served.generate(
            prompt="a <cat-toy>", negative_prompt="blurry", seed=3, image_format=image_format
        )
        (image,) = images(responses)
        assert image.format == image_format
        assert Image.open(io.BytesIO(image.image)).format == name
        assert read_parameters(image.image) == {
            "prompt": "a <cat-toy>",
            "negative_prompt": "blurry",
            "concepts": {"<cat-toy>": make_concept().concept_id},
            "seed": 3,
            "sampler": "ddim",
            "num_inference_steps": 4,
            "guidance_scale": 7.5,
            "width": 64,
            "height": 64,
            "model": "fake",
        }


async def test_an_initial_image_sets_size_and_share_of_the_steps(served: Harness) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (43, 80), (200, 30, 30)).save(buffer, "PNG")
    responses = await served.generate(
        init_image=buffer.getvalue(), strength=0.5, num_inference_steps=10
    )
    assert (responses[0].accepted.width, responses[0].accepted.height) == (40, 80)
    assert [r.progress.num_steps for r in responses if r.HasField("progress")] == [5] * 5


async def test_text_without_room_is_reported(served: Harness) -> None:
    # 8 chunks of 14 tokens; the words beyond are cut.
    responses = await served.generate(prompt="cat " * 112 + "red dog", guidance_scale=1)
    summary = responses[-1].summary
    assert (summary.num_tokens, summary.num_chunks) == (112, 8)
    assert summary.cut_prompt.split() == ["reddog"] or summary.cut_prompt.split() == ["red", "dog"]


# Concepts in requests


async def test_a_stored_concept_is_found_by_its_name_in_the_prompt(served: Harness) -> None:
    concept = make_concept()
    served.store.import_concept(concept)
    plain = await served.generate(prompt="a photo of cat", seed=1)
    learned = await served.generate(prompt="a photo of <cat-toy>", seed=1)
    (matched,) = learned[-1].summary.matched_concepts
    assert (matched.placeholder_token, matched.concept_id, matched.num_vectors) == (
        "<cat-toy>",
        concept.concept_id,
        2,
    )
    assert learned[-1].summary.num_tokens == 5
    assert images(plain)[0].image != images(learned)[0].image


async def test_inline_stored_and_bare_vectors_make_the_same_image(served: Harness) -> None:
    concept = make_concept()
    served.store.import_concept(concept)
    references = {
        "by name": generation_pb2.ConceptReference(placeholder_token="<cat-toy>"),
        "by id": generation_pb2.ConceptReference(concept_id=concept.concept_id),
        "own format": inline(concept_to_bytes(concept)),
        "diffusers": inline(concept_to_bytes(concept, "diffusers")),
        "renamed": inline(concept_to_bytes(make_concept("<other>")), "<cat-toy>"),
        "bare": bare("<cat-toy>", [0.5] * 2 * DIM, num_vectors=2),
    }
    expected = images(await served.generate(prompt="a <cat-toy>", seed=1))[0].image
    for kind, reference in references.items():
        responses = await served.generate(prompt="a <cat-toy>", seed=1, concepts=[reference])
        assert images(responses)[0].image == expected, kind


async def test_an_inline_concept_goes_before_a_stored_one_and_is_not_kept(served: Harness) -> None:
    served.store.import_concept(make_concept(value=0.5))
    mine = make_concept(value=-2.0)
    responses = await served.generate(prompt="<cat-toy>", concepts=[inline(concept_to_bytes(mine))])
    assert responses[-1].summary.matched_concepts[0].concept_id == mine.concept_id
    assert served.store.find_by_token("<cat-toy>").concept_id != mine.concept_id


async def test_a_name_without_brackets_must_be_referred_to(served: Harness) -> None:
    served.store.import_concept(make_concept("cat"))
    ordinary = await served.generate(prompt="a cat")
    reference = generation_pb2.ConceptReference(placeholder_token="cat")
    learned = await served.generate(prompt="a cat", concepts=[reference])
    assert len(ordinary[-1].summary.matched_concepts) == 0
    assert len(learned[-1].summary.matched_concepts) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a <cat-toi>"},
        {"negative_prompt": "<cat-toi>"},
        {"concepts": [generation_pb2.ConceptReference(placeholder_token="<cat-toi>")]},
        {"concepts": [generation_pb2.ConceptReference(concept_id="<cat-toi>")]},
    ],
    ids=["prompt", "negative prompt", "by name", "by id"],
)
async def test_an_unknown_concept_is_not_found(served: Harness, fields: dict[str, Any]) -> None:
    served.store.import_concept(make_concept())
    error = await served.refusal(**fields)
    assert error.code() == StatusCode.NOT_FOUND
    assert "'<cat-toi>'; stored: <cat-toy>" in (error.details() or "")
    resource = details(error)["google.rpc.ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("concept", "<cat-toi>")
    assert served.denoiser.num_calls == 0


@pytest.mark.parametrize(
    "concept",
    [
        make_concept(learned_embeddings=np.ones((1, DIM + 1), np.float32)),
        make_concept(embedding_fingerprint="0" * 64),
        make_concept(learned_embeddings=np.ones((15, DIM), np.float32)),
    ],
    ids=["width", "fingerprint", "too many vectors for the encoder"],
)
async def test_a_concept_of_another_model_fails_the_precondition(
    served: Harness, concept: Concept
) -> None:
    error = await served.refusal(prompt="<cat-toy>", concepts=[inline(concept_to_bytes(concept))])
    assert error.code() == StatusCode.FAILED_PRECONDITION
    assert "model 'fake'" in (error.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.concepts.ImportConcept(
            concepts_pb2.ImportConceptRequest(content=concept_to_bytes(concept))
        )
    assert caught.value.code() == StatusCode.FAILED_PRECONDITION
    assert served.store.list(limit=1) == []


def safetensors_with_header(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


SOUND = concept_to_bytes(make_concept())


@pytest.mark.parametrize("header_length", [128, 0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
async def test_sound_files_are_read_whatever_the_length_of_their_header(
    served: Harness, header_length: int
) -> None:
    """A file begins with that length: 0x0280 begins like a pickle, 0x4B50 like a zip archive."""
    fields = b'"<x>":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}' % (DIM, 4 * DIM)
    for header in (b"{" + fields, b'{"__metadata__":null,' + fields):
        content = safetensors_with_header(header.ljust(header_length - 1) + b"}") + bytes(4 * DIM)
        assert await served.generate(prompt="<x>", concepts=[inline(content)])


UNREADABLE = {
    "empty": b"",
    "truncated": SOUND[:-5],
    "header cut": SOUND[:20],
    "header of 2^63 bytes": safetensors_with_header(b"{}", 2**63),
    "no tensor": safetensors_with_header(b"{}      "),
    "null metadata": safetensors_with_header(b'{"__metadata__": null}  '),
    "gap": safetensors_with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}')
    + bytes(8),
    "pickle": pickle.dumps({"<cat-toy>": [1.0]}),
    "zip": b"PK\x03\x04" + bytes(64),
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "NaN": save_safetensors({"<x>": np.full((1, DIM), np.nan, np.float32)}),
    "beyond float32": save_safetensors({"<x>": np.full((1, DIM), 1e300)}),
    "integers": save_safetensors({"<x>": np.ones((1, DIM), np.int8)}),
    "no vectors": save_safetensors({"<x>": np.ones((0, DIM), np.float32)}),
    "three axes": save_safetensors({"<x>": np.ones((1, 1, DIM), np.float32)}),
    "two tensors": save_safetensors({"<x>": np.ones(DIM), "<y>": np.ones(DIM)}),
    "nameless": save_safetensors({"emb_params": np.ones((1, DIM), np.float32)}),
    "no token": save_safetensors({"": np.ones((1, DIM), np.float32)}),
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
async def test_an_unreadable_concept_is_an_invalid_argument(
    served: Harness, content: bytes
) -> None:
    sound = inline(SOUND)
    error = await served.refusal(prompt="<cat-toy>", concepts=[sound, inline(content)])
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(error) == "concepts[1]"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.concepts.ImportConcept(concepts_pb2.ImportConceptRequest(content=content))
    assert caught.value.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(caught.value) in ("content", "placeholder_token")
    assert await served.generate(prompt="a cat")  # and the server lives


@pytest.mark.parametrize(
    "reference",
    [
        generation_pb2.ConceptReference(),
        generation_pb2.ConceptReference(inline=generation_pb2.InlineConcept()),
        bare("<x>", []),
        bare("<x>", [1.0] * DIM, num_vectors=0),
        bare("<x>", [1.0] * DIM, num_vectors=5),
        bare("<x>", [1.0] * DIM, num_vectors=2**32 - 1),
        bare("<x>", [float("nan")] * DIM),
        bare("", [1.0] * DIM),
        bare("two words", [1.0] * DIM),
        bare("<\x1b[31m>", [1.0] * DIM),
        bare("<\u202e>", [1.0] * DIM),
        bare("<\x9b>", [1.0] * DIM),
        bare("<\u2060>", [1.0] * DIM),
        bare("<" + "x" * 64 + ">", [1.0] * DIM),
    ],
)
async def test_a_reference_that_says_nothing_sound_is_an_invalid_argument(
    served: Harness, reference: generation_pb2.ConceptReference
) -> None:
    error = await served.refusal(prompt="a cat", concepts=[reference])
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(error) == "concepts[0]"


async def test_inline_concepts_end_at_their_limit(start_server: StartServer) -> None:
    served = await start_server(limits=Limits(max_inline_concept_bytes=1000))
    just_fits = make_concept(metadata={"note": "x" * 100})
    assert len(concept_to_bytes(just_fits)) < 1000
    await served.generate(prompt="<cat-toy>", concepts=[inline(concept_to_bytes(just_fits))])
    too_large = make_concept(metadata={"note": "x" * 1000})
    error = await served.refusal(concepts=[inline(concept_to_bytes(too_large))])
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert "at most 1000; import it" in (error.details() or "")
    error = await served.refusal(concepts=[bare("<x>", [1.0] * 300)])
    assert error.code() == StatusCode.INVALID_ARGUMENT


async def test_a_request_may_name_so_many_concepts_and_no_more(served: Harness) -> None:
    references = [bare(f"<c{index}>", [0.1] * DIM) for index in range(5)]
    await served.generate(prompt="a cat", concepts=references[:4])
    for fields in (
        {"concepts": references},
        {"concepts": references[:4], "prompt": "<c9>"},
        {"prompt": " ".join(f"<c{index}>" for index in range(1_000))},
    ):
        error = await served.refusal(**fields)
        assert error.code() == StatusCode.INVALID_ARGUMENT
        assert "may use 4 concepts" in (error.details() or "")


# Refusals


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "x" * (1 << 20)}, "prompt"),
        ({"prompt": "<a>" * 10_000}, "prompt"),
        ({"negative_prompt": "<a>" * 10_000}, "negative_prompt"),
        ({"prompt": "(cat:nan)"}, "prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10**9}, "num_inference_steps"),
        ({"width": 0}, "width"),
        ({"width": 7}, "width"),
        ({"width": 68}, "width"),
        ({"width": 10**6}, "width"),
        ({"height": 2**32 - 1}, "height"),
        ({"width": 2048, "height": 2048}, "width"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 2**32 - 1}, "num_images"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": 1e30}, "guidance_scale"),
        ({"sampler": "euler_z"}, "sampler"),
        ({"sampler": "x" * 100_000}, "sampler"),
        ({"sampler": "\x1b[31m\n"}, "sampler"),
        ({"strength": 0.5}, "strength"),
        ({"init_image": b"GIF89a", "strength": 0.5}, "init_image"),
        ({"preview_every_steps": 10**6}, "preview_every_steps"),
        ({"image_format": 99}, "image_format"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_the_caller_can_mend_names_the_field(
    served: Harness, fields: dict[str, Any], field: str
) -> None:
    error = await served.refusal(**fields)
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field
    assert details(error)["google.rpc.ErrorInfo"].domain == "oneword"
    assert served.denoiser.num_calls == 0


async def test_a_prompt_too_long_is_refused_before_it_is_searched(served: Harness) -> None:
    """15 MB of different placeholders are 1.5 million look-ups, if anyone looks."""
    prompt = "".join(f"<a{index}>" for index in range(1_500_000))
    error = await served.refusal(prompt=prompt)
    assert details(error)["google.rpc.ErrorInfo"].reason == "PROMPT_TOO_LONG"


@pytest.mark.parametrize("sampler", ["x" * 5000, "\U0001f600" * 5000], ids=["x", "emoji"])
async def test_a_long_value_leaves_room_for_what_is_known(served: Harness, sampler: str) -> None:
    error = await served.refusal(sampler=sampler)
    assert "known: ddim, euler" in (error.details() or "")


async def test_a_strength_that_is_no_share_is_refused(served: Harness) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    for strength in (0.0, -1.0, 1.5, float("nan")):
        error = await served.refusal(init_image=buffer.getvalue(), strength=strength)
        assert error.code() == StatusCode.INVALID_ARGUMENT


async def test_a_message_beyond_the_limit_is_refused(start_server: StartServer) -> None:
    served = await start_server(max_message_bytes=1 << 20)
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        call = served.generation.Generate(
            GenerateRequest(init_image=bytes(8 << 20)), compression=compression, timeout=WAIT_S
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
    assert await served.generate(prompt="a cat")


async def test_a_full_queue_says_when_to_come_back(start_server: StartServer) -> None:
    served = await start_server(
        batcher=BatcherConfig(max_images_in_flight=1, max_queued_images=1, max_batch_rows=2)
    )
    served.denoiser.gate.clear()
    first = asyncio.create_task(served.generate(prompt="a cat"))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    second = asyncio.create_task(served.generate(prompt="a dog"))
    while served.server.batcher.load != (1, 1):
        await asyncio.sleep(0.005)
    error = await served.refusal(prompt="a red dog")
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    delay = details(error)["google.rpc.RetryInfo"].retry_delay
    assert 0 < delay.ToTimedelta().total_seconds() < 60
    served.denoiser.gate.set()
    assert kinds(await first)[-1] == kinds(await second)[-1] == "summary"


async def test_a_deadline_of_a_millisecond_is_exceeded_and_leaves_nothing(served: Harness) -> None:
    error = await served.refusal(prompt="a cat", num_inference_steps=100, timeout=0.001)
    assert error.code() == StatusCode.DEADLINE_EXCEEDED
    assert await served.is_idle()


async def test_the_deadline_of_the_call_is_that_of_the_job(served: Harness) -> None:
    served.denoiser.gate.clear()
    call = asyncio.create_task(served.refusal(prompt="a cat", timeout=0.2))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    (slot,) = served.server.batcher._slots
    assert slot.job.deadline is not None
    assert 0.0 < slot.job.deadline - slot.job.submitted <= 0.2
    assert (await call).code() == StatusCode.DEADLINE_EXCEEDED
    served.denoiser.gate.set()
    assert await served.is_idle()
    assert served.denoiser.num_calls == 1


async def test_what_breaks_inside_stays_inside(
    served: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    served.denoiser.error = RuntimeError("secret at /srv/models")
    with caplog.at_level(logging.ERROR):
        error = await served.refusal(prompt="a red cat")
    assert error.code() == StatusCode.INTERNAL
    request_id = details(error)["google.rpc.RequestInfo"].request_id
    assert "secret" not in f"{error.details()} {error.trailing_metadata()}"
    assert request_id in (error.details() or "") and request_id in caplog.text
    assert "red cat" not in caplog.text
    served.denoiser.error = None
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"


async def test_prompts_are_not_logged(served: Harness, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await served.generate(prompt="a red dog")
        await served.refusal(prompt="a red <dog>")
    assert "red" not in caplog.text


def test_every_error_of_the_runtime_has_a_status() -> None:
    found: set[type[EngineError]] = {EngineError}
    waiting = [EngineError]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        waiting += subclasses
        found |= {c for c in subclasses if c.__module__ == engine.errors.__name__}
    assert found == set(STATUS)


def test_long_texts_of_callers_fit_into_trailers() -> None:
    error = engine.errors.InvalidRequest("\U0001f600" * 100_000, field="prompt")
    status = status_of(error, "0" * 32)
    (details_bin,) = [value for _, value in status.trailing_metadata or ()]
    # grpc-message is percent-encoded: three characters a byte. Peers refuse beyond 8 KiB.
    assert 3 * len((status.details or "").encode()) + len(details_bin) * 4 / 3 < 8 << 10


# Callers that leave, and callers that do not read


async def test_a_reader_that_lags_loses_old_steps_and_nothing_else() -> None:
    stream = EventStream(asyncio.get_running_loop())
    picture = np.zeros((8, 8, 3), np.uint8)
    stream.put(ImageDone(image_index=0, seed=0, image=picture))
    for number in range(1, 1001):
        stream.put(StepDone(image_index=1, step=number, num_steps=1000))
    stream.put(ImageDone(image_index=1, seed=1, image=picture))
    await asyncio.sleep(0)  # the loop takes over what other threads have put
    assert len(stream._events) == MAX_WAITING_STEPS + 2
    events = [await stream.get() for _ in range(MAX_WAITING_STEPS + 2)]
    assert isinstance(events[0], ImageDone) and isinstance(events[-1], ImageDone)
    steps = [event.step for event in events if isinstance(event, StepDone)]
    assert steps == list(range(1001 - MAX_WAITING_STEPS, 1001))


async def test_a_caller_that_leaves_frees_its_place_within_a_step(served: Harness) -> None:
    served.denoiser.gate.clear()
    call = served.generation.Generate(GenerateRequest(prompt="a cat", num_inference_steps=100))
    assert (await first_response(call)).HasField("accepted")
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    call.cancel()
    while served.server.generation.active:
        await asyncio.sleep(0.005)
    served.denoiser.gate.set()
    assert await served.is_idle()
    assert served.denoiser.num_calls == 1
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"


async def test_a_waiting_caller_that_leaves_is_not_begun(start_server: StartServer) -> None:
    served = await start_server(batcher=BatcherConfig(max_images_in_flight=1))
    served.denoiser.gate.clear()
    first = asyncio.create_task(served.generate(prompt="a cat"))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    second = served.generation.Generate(GenerateRequest(prompt="a dog"))
    accepted = await first_response(second)
    second.cancel()
    while served.server.generation.active == 2:
        await asyncio.sleep(0.005)
    served.denoiser.gate.set()
    await first
    assert accepted.accepted.queue_position == 0
    assert await served.is_idle()
    assert served.denoiser.num_calls == 4  # the first one's steps, no more


async def test_a_connection_that_breaks_frees_its_place(served: Harness) -> None:
    served.denoiser.gate.clear()
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = ImageGenerationServiceStub(channel)
        call = stub.Generate(GenerateRequest(prompt="a cat", num_inference_steps=100))
        assert (await first_response(call)).HasField("accepted")
        await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    while served.server.generation.active:  # until the server has noticed
        await asyncio.sleep(0.005)
    served.denoiser.gate.set()
    assert await served.is_idle()
    assert served.denoiser.num_calls == 1


async def test_many_cancelled_streams_leave_nothing_behind(served: Harness) -> None:
    await served.generate(prompt="a cat")
    gc.collect()
    tasks = len(asyncio.all_tasks())
    for turn in range(100):
        call = served.generation.Generate(
            GenerateRequest(prompt="a cat", num_inference_steps=100, preview_every_steps=1)
        )
        if turn % 3:  # before the first answer, after it, in the middle
            await call.read()
        if turn % 3 == 2:
            await call.read()
        call.cancel()
    assert await served.is_idle()
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"
    for _ in range(100):
        gc.collect()
        if len(asyncio.all_tasks()) <= tasks:
            break
        await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks()) <= tasks


async def test_a_caller_that_does_not_read_is_dropped(start_server: StartServer) -> None:
    served = await start_server(stall_timeout_s=0.2, limits=Limits(max_pixels=512 * 512))
    # A window that does not grow: else the transport takes some megabytes by itself.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    async with grpc.aio.insecure_channel(served.address, options=options) as channel:
        call = ImageGenerationServiceStub(channel).Generate(
            GenerateRequest(num_images=8, width=512, height=512, num_inference_steps=1)
        )
        assert (await first_response(call)).HasField("accepted")
        assert await served.is_idle()  # though nothing more was read
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
    assert caught.value.code() == StatusCode.CANCELLED
    assert "nothing was read for 0.2 s" in (caught.value.details() or "")
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"


# Stored concepts


async def import_file(served: Harness, content: bytes, **fields: Any) -> Any:
    request = concepts_pb2.ImportConceptRequest(content=content, **fields)
    return await served.concepts.ImportConcept(request, timeout=WAIT_S)


async def code_of(call: Any) -> StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_import_describe_and_export(served: Harness) -> None:
    concept = make_concept(embedding_fingerprint=_fingerprint(served), metadata={"steps": "500"})
    imported = await import_file(served, concept_to_bytes(concept))
    by_id = concepts_pb2.GetConceptRequest(concept_id=concept.concept_id)
    described = (await served.concepts.GetConcept(by_id)).concept
    assert imported.changed
    assert (described.placeholder_token, described.num_vectors, described.dim) == (
        "<cat-toy>",
        2,
        DIM,
    )
    assert dict(described.metadata) == {"steps": "500"}
    assert described.import_time == imported.concept.import_time
    for file_format in (
        concepts_pb2.CONCEPT_FORMAT_UNSPECIFIED,
        concepts_pb2.CONCEPT_FORMAT_ONEWORD,
        concepts_pb2.CONCEPT_FORMAT_DIFFUSERS,
    ):
        request = concepts_pb2.ExportConceptRequest(
            placeholder_token="<cat-toy>", format=file_format
        )
        exported = await served.concepts.ExportConcept(request)
        back = concept_from_bytes(exported.content, source="export")
        assert (back.placeholder_token, back.concept_id) == ("<cat-toy>", concept.concept_id)
        again = await import_file(served, exported.content)
        assert not again.changed


def _fingerprint(served: Harness) -> str:
    return served.server._runtime.pipeline.bundle.manifest.text.embedding_fingerprint


async def test_an_imported_concept_can_be_used_at_once_and_a_deleted_one_cannot(
    served: Harness,
) -> None:
    await import_file(served, SOUND, placeholder_token="<mine>")
    assert await served.generate(prompt="a <mine>")
    await served.concepts.DeleteConcept(
        concepts_pb2.DeleteConceptRequest(placeholder_token="<mine>")
    )
    assert (await served.refusal(prompt="a <mine>")).code() == StatusCode.NOT_FOUND
    for call in (
        served.concepts.GetConcept(concepts_pb2.GetConceptRequest(placeholder_token="<mine>")),
        served.concepts.ExportConcept(concepts_pb2.ExportConceptRequest(concept_id="0" * 64)),
        served.concepts.DeleteConcept(concepts_pb2.DeleteConceptRequest(placeholder_token="<m>")),
    ):
        assert await code_of(call) == StatusCode.NOT_FOUND


async def test_a_taken_name_needs_overwrite(served: Harness) -> None:
    await import_file(served, SOUND)
    other = concept_to_bytes(make_concept(value=-1.0))
    assert await code_of(import_file(served, other)) == StatusCode.ALREADY_EXISTS
    replaced = await import_file(served, other, overwrite=True)
    assert replaced.changed
    assert replaced.concept.concept_id == make_concept(value=-1.0).concept_id
    again = await import_file(served, other, overwrite=True)
    assert (again.changed, again.concept) == (False, replaced.concept)


async def test_a_concept_asked_for_by_its_id_has_that_id(
    served: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process replaces the concept after its row was found and before it is read."""
    other = ConceptStore(served.store._files.parent)
    first, second = make_concept(value=1.0), make_concept(value=2.0)
    read = ConceptStore._read

    def overtaken(self: ConceptStore, stored: StoredConcept) -> Concept:
        other.import_concept(second, overwrite=True)
        return read(self, stored)

    monkeypatch.setattr(ConceptStore, "_read", overtaken)
    for call in (
        served.concepts.ExportConcept(
            concepts_pb2.ExportConceptRequest(concept_id=first.concept_id)
        ),
        served.concepts.GetConcept(concepts_pb2.GetConceptRequest(concept_id=first.concept_id)),
    ):
        served.store.import_concept(first, overwrite=True)
        assert await code_of(call) == StatusCode.NOT_FOUND
    other.close()


async def test_listing_walks_through_all_pages(served: Harness) -> None:
    tokens = sorted(f"<c{index}>" for index in range(23))
    for token in tokens:
        served.store.import_concept(make_concept(token, metadata={"long": "text"}))
    found: list[str] = []
    request = concepts_pb2.ListConceptsRequest(page_size=10)
    sizes: list[int] = []
    while True:
        page = await served.concepts.ListConcepts(request)
        sizes.append(len(page.concepts))
        found += [concept.placeholder_token for concept in page.concepts]
        assert not any(concept.metadata for concept in page.concepts)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert (sizes, found) == ([10, 10, 3], tokens)


async def test_a_last_page_that_is_full_has_no_next_one(served: Harness) -> None:
    for token in ("<a>", "<b>"):
        served.store.import_concept(make_concept(token))
    page = await served.concepts.ListConcepts(concepts_pb2.ListConceptsRequest(page_size=2))
    assert (len(page.concepts), page.next_page_token) == (2, "")


@pytest.mark.parametrize(
    "request_",
    [
        concepts_pb2.ListConceptsRequest(page_size=-1),
        concepts_pb2.ListConceptsRequest(page_size=1001),
        concepts_pb2.ListConceptsRequest(page_token="not one of ours!"),
        concepts_pb2.ListConceptsRequest(page_token="//////8="),
    ],
)
async def test_bad_pages_are_invalid(
    served: Harness, request_: concepts_pb2.ListConceptsRequest
) -> None:
    assert await code_of(served.concepts.ListConcepts(request_)) == StatusCode.INVALID_ARGUMENT


async def test_a_request_for_no_concept_is_invalid(served: Harness) -> None:
    served.store.import_concept(make_concept())
    unknown_format = concepts_pb2.ExportConceptRequest(placeholder_token="<cat-toy>", format=9)  # pyright: ignore[reportArgumentType]
    for call in (
        served.concepts.GetConcept(concepts_pb2.GetConceptRequest()),
        served.concepts.ExportConcept(unknown_format),
    ):
        assert await code_of(call) == StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "token", ["../../etc/passwd", "..\\x", "/abs", "<%2e%2e>", "<con>", "<\u00e9>", "__metadata__"]
)
async def test_hostile_names_are_kept_as_names_or_refused(served: Harness, token: str) -> None:
    request = concepts_pb2.ImportConceptRequest(content=SOUND, placeholder_token=token)
    try:
        await served.concepts.ImportConcept(request)
    except grpc.aio.AioRpcError as error:
        assert error.code() == StatusCode.INVALID_ARGUMENT
        return
    for file_format in (concepts_pb2.CONCEPT_FORMAT_ONEWORD, concepts_pb2.CONCEPT_FORMAT_DIFFUSERS):
        export = concepts_pb2.ExportConceptRequest(placeholder_token=token, format=file_format)
        content = (await served.concepts.ExportConcept(export)).content
        assert concept_from_bytes(content, source="export").placeholder_token == token


async def test_a_damaged_stored_concept_is_data_loss(served: Harness) -> None:
    await import_file(served, SOUND)
    (path,) = served.store._files.iterdir()
    path.write_bytes(b"gone")
    error = await served.refusal(prompt="<cat-toy>")
    assert error.code() == StatusCode.DATA_LOSS
    assert str(path.parent) not in (error.details() or "")


# Server information


async def test_the_server_describes_model_limits_and_load(served: Harness) -> None:
    served.denoiser.gate.clear()
    running = asyncio.create_task(served.generate(prompt="a cat"))
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    info = await served.info.GetServerInfo(server_info_pb2.GetServerInfoRequest())
    served.denoiser.gate.set()
    await running
    assert (info.model.name, info.model.precision, info.model.default_size) == ("fake", "fp32", 64)
    assert list(info.model.samplers) == ["ddim", "euler"]
    assert info.model.embedding_dim == DIM
    assert info.model.embedding_fingerprint == _fingerprint(served)
    assert info.limits.max_concepts_per_request == SMALL_LIMITS.max_concepts_per_request
    assert info.limits.max_queued_images == BatcherConfig().max_queued_images
    assert (info.load.images_in_flight, info.load.images_queued) == (1, 0)
    assert set(info.versions) == {"onnx", "oneword"}
