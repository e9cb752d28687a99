"""Concepts in requests over a real gRPC server: by name, by id, as files and as bare vectors."""

import pickle
import struct
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc import StatusCode
from safetensors.numpy import save as save_safetensors

from engine.concepts import Concept, concept_to_bytes
from engine.requests import Limits
from protos.oneword.v1 import concepts_pb2, generation_pb2
from tests import service_harness
from tests.fakes import DIM
from tests.service_harness import (
    SOUND,
    Harness,
    StartServer,
    bare,
    details,
    field_of,
    images,
    inline,
    make_concept,
)

# Fixtures.
start_server, served = service_harness.start_server, service_harness.served


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
