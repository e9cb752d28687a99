"""Versions, aliases, etags and deletions of stored concepts over a real gRPC server."""

import base64
import hashlib
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode

from engine.client import AsyncClient, ServerError
from engine.concepts import concept_to_bytes
from engine.errors import InvalidRequest
from protos.oneword.v1 import concepts_pb2, generation_pb2
from tests import service_harness
from tests.service_harness import SOUND, Harness, code_of, details, field_of, import_file
from tests.service_harness import make_concept as concept_of

# Fixtures.
start_server, served = service_harness.start_server, service_harness.served

NAME = "<cat-toy>"


async def publish(served: Harness, *values: float, **fields: Any) -> list[concepts_pb2.Concept]:
    """Versions of one name, as the server tells of them."""
    found: list[concepts_pb2.Concept] = []
    for value in values:
        content = concept_to_bytes(concept_of(value=value))
        found.append((await import_file(served, content, overwrite=True, **fields)).concept)
    return found


async def get(served: Harness, reference: str = NAME, **key: str) -> concepts_pb2.Concept:
    request = concepts_pb2.GetConceptRequest(**(key or {"placeholder_token": reference}))
    return (await served.concepts.GetConcept(request)).concept


async def set_alias(served: Harness, alias: str, **fields: Any) -> concepts_pb2.Concept:
    request = concepts_pb2.SetConceptAliasRequest(placeholder_token=NAME, alias=alias, **fields)
    return (await served.concepts.SetConceptAlias(request)).concept


async def versions(served: Harness, **fields: Any) -> concepts_pb2.ListConceptVersionsResponse:
    fields.setdefault("placeholder_token", NAME)
    request = concepts_pb2.ListConceptVersionsRequest(**fields)
    return await served.concepts.ListConceptVersions(request)


async def delete(served: Harness, etag: str = "") -> None:
    request = concepts_pb2.DeleteConceptRequest(placeholder_token=NAME, etag=etag)
    await served.concepts.DeleteConcept(request)


async def undelete(served: Harness, name: str = NAME) -> concepts_pb2.Concept:
    request = concepts_pb2.UndeleteConceptRequest(placeholder_token=name)
    return (await served.concepts.UndeleteConcept(request)).concept


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# What is told


async def test_a_concept_tells_version_etag_aliases_and_the_digest_of_its_file(
    served: Harness,
) -> None:
    first, second = await publish(served, 1.0, 2.0)
    assert (first.version, second.version) == (1, 2)
    assert first.etag and first.etag != second.etag
    assert not second.HasField("delete_time")
    export = concepts_pb2.ExportConceptRequest(placeholder_token=f"{NAME}@1")
    exported = await served.concepts.ExportConcept(export)
    assert hashlib.sha256(exported.content).hexdigest() == first.file_sha256
    assert first.num_bytes == len(exported.content)
    assert exported.concept.version == 1
    await set_alias(served, "stable", version=1)
    await set_alias(served, "old", version=1)
    for reference, aliases in ((f"{NAME}@1", ["old", "stable"]), (NAME, [])):
        assert list((await get(served, reference)).aliases) == aliases
    await set_alias(served, "newest")
    (listed,) = (await served.concepts.ListConcepts(concepts_pb2.ListConceptsRequest())).concepts
    assert (listed.version, list(listed.aliases)) == (2, ["newest"])
    assert listed.etag == (await get(served)).etag != second.etag


async def test_an_answer_tells_which_version_was_used(served: Harness) -> None:
    await publish(served, 1.0, 2.0)
    pinned = generation_pb2.ConceptReference(placeholder_token=f"{NAME}@1")
    inline = service_harness.inline(SOUND)
    for concepts, version in (([], 2), ([pinned], 1), ([inline], 0)):
        responses = await served.generate(prompt=f"a {NAME}", concepts=concepts)
        (matched,) = responses[-1].summary.matched_concepts
        assert matched.version == version


async def test_the_same_vectors_again_are_the_version_that_was_asked_for(served: Harness) -> None:
    """The file of versions 1 and 3 is one, and is cached once."""
    await publish(served, 1.0, 2.0, 1.0)
    for number in (3, 1, 3):
        pinned = generation_pb2.ConceptReference(placeholder_token=f"{NAME}@{number}")
        responses = await served.generate(prompt=f"a {NAME}", concepts=[pinned])
        assert responses[-1].summary.matched_concepts[0].version == number


async def test_versions_are_listed_page_by_page_the_newest_first(served: Harness) -> None:
    await publish(served, *range(1, 6))
    await set_alias(served, "stable", version=2)
    found: list[tuple[int, list[str]]] = []
    sizes: list[int] = []
    page_token = ""
    while True:
        page = await versions(served, page_size=2, page_token=page_token)
        sizes.append(len(page.versions))
        found += [(version.version, list(version.aliases)) for version in page.versions]
        page_token = page.next_page_token
        if not page_token:
            break
    assert (sizes, found) == ([2, 2, 1], [(5, []), (4, []), (3, []), (2, ["stable"]), (1, [])])


# What is refused


@pytest.mark.parametrize(
    "alias", ["", "3", "latest", "Stable", "sha256:0000000000", "a@b", "../x", "a b", "a" * 64, "é"]
)
async def test_an_alias_that_could_be_taken_for_something_else_is_invalid(
    served: Harness, alias: str
) -> None:
    await publish(served, 1.0)
    error = await refused(set_alias(served, alias))
    assert (error.code(), field_of(error)) == (StatusCode.INVALID_ARGUMENT, "alias")
    assert (await get(served)).aliases == []


async def test_aliases_and_versions_that_are_not_there_are_not_found(served: Harness) -> None:
    await publish(served, 1.0)
    for version in (0, 2, 1 << 63, (1 << 64) - 1):
        assert await code_of(set_alias(served, "x", version=version)) == StatusCode.NOT_FOUND
    for name, alias in ((NAME, "x"), (NAME, "latest"), ("<dog>", "x"), ("a\0", "x"), (NAME, "\0")):
        request = concepts_pb2.DeleteConceptAliasRequest(placeholder_token=name, alias=alias)
        call = served.concepts.DeleteConceptAlias(request)
        assert await code_of(call) == StatusCode.NOT_FOUND
    for name in ("", "<dog>", f"{NAME}@1", "a\0"):
        assert await code_of(versions(served, placeholder_token=name)) == StatusCode.NOT_FOUND
        assert await code_of(undelete(served, name)) == StatusCode.NOT_FOUND


def token_of(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


@pytest.mark.parametrize(
    "fields",
    [
        {"page_size": -1},
        {"page_size": 1001},
        {"page_token": "not one of ours!"},
        {"page_token": "//////8="},
        {"page_token": token_of(NAME)},
        {"page_token": token_of("2 <dog>")},
        {"page_token": token_of(f"-1 {NAME}")},
        {"page_token": token_of(f"² {NAME}")},
        {"page_token": token_of(f"{'9' * 19} {NAME}")},
        {"page_token": token_of(f" {NAME}")},
    ],
    ids=ascii,
)
async def test_bad_pages_of_versions_are_invalid(served: Harness, fields: dict[str, Any]) -> None:
    await publish(served, 1.0)
    assert await code_of(versions(served, **fields)) == StatusCode.INVALID_ARGUMENT


async def test_a_change_with_an_etag_of_before_is_aborted(served: Harness) -> None:
    (first,) = await publish(served, 1.0)
    await set_alias(served, "stable")
    before = await get(served)
    unalias = concepts_pb2.DeleteConceptAliasRequest(
        placeholder_token=NAME, alias="stable", etag=first.etag
    )
    for stale in (first.etag, "nonsense", "x" * 5000):
        unalias.etag = stale
        for call in (
            publish(served, 2.0, etag=stale),
            delete(served, stale),
            set_alias(served, "canary", etag=stale),
            served.concepts.DeleteConceptAlias(unalias),
        ):
            error = await refused(call)
            assert error.code() == StatusCode.ABORTED
            assert details(error)["google.rpc.ErrorInfo"].reason == "STALE_ETAG"
            assert "look at it again" in (error.details() or "")
    assert await get(served) == before
    (second,) = await publish(served, 2.0, etag=before.etag)
    moved = await set_alias(served, "canary", etag=second.etag)
    unalias.etag = moved.etag
    await served.concepts.DeleteConceptAlias(unalias)
    await delete(served, (await get(served)).etag)
    assert await code_of(get(served)) == StatusCode.NOT_FOUND


# Deleting and bringing back


async def test_a_deleted_concept_tells_so_and_comes_back_whole(served: Harness) -> None:
    first, second = await publish(served, 1.0, 2.0)
    await set_alias(served, "stable", version=1)
    await delete(served)
    assert await code_of(get(served, f"{NAME}@stable")) == StatusCode.NOT_FOUND
    gone = await get(served, concept_id=first.concept_id)
    assert gone.delete_time.ToDatetime() >= gone.import_time.ToDatetime()
    assert (gone.version, list(gone.aliases)) == (1, [])
    back = await undelete(served)
    assert (back.concept_id, back.HasField("delete_time")) == (second.concept_id, False)
    assert list((await get(served, f"{NAME}@1")).aliases) == ["stable"]
    assert await served.generate(prompt=f"a {NAME}")
    error = await refused(undelete(served))
    assert error.code() == StatusCode.ALREADY_EXISTS
    assert "is not deleted" in (error.details() or "")


# The client


async def test_the_client_does_all_of_it(served: Harness) -> None:
    async with AsyncClient(served.address) as client:
        for value in (1.0, 2.0):
            content = concept_to_bytes(concept_of(value=value))
            stored = (await client.import_concept(content, overwrite=True)).concept
        assert (await client.set_alias(NAME, "stable", version=1)).version == 1
        found = [(v.version, list(v.aliases)) async for v in client.versions(NAME)]
        assert found == [(2, []), (1, ["stable"])]
        with pytest.raises(ServerError, match="has changed since") as caught:
            await client.delete(NAME, etag=stored.etag)
        # Nothing that waiting would mend.
        assert (caught.value.reason, caught.value.attempts) == ("STALE_ETAG", 1)
        await client.delete_alias(NAME, "stable")
        await client.delete(NAME, etag=(await client.get(NAME)).etag)
        assert (await client.undelete(NAME)).version == 2
        for version in (0, -1, 1 << 64):
            with pytest.raises(InvalidRequest, match=f"at least 1, .* got {version}"):
                await client.set_alias(NAME, "x", version=version)
