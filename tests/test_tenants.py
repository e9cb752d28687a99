"""Two tenants of one server: neither sees, changes or learns of what is the other's (group 12)."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.message import Message
from grpc import StatusCode

from engine.concepts import concept_to_bytes
from engine.security.callers import Scope
from engine.security.method_scopes import SCOPE
from engine.training.folder import TrainingRecord
from engine.training.spec import TrainingSpec
from protos.oneword.v1 import concepts_pb2, generation_pb2, training_pb2
from tests import security_setup
from tests.security_setup import Caller, Secured
from tests.service_harness import make_concept
from tests.training_harness import IMAGES, TIMEOUT_S, create_requests

# Fixtures.
start_secured, secured = security_setup.start_secured, security_setup.secured

GENERATE = "/oneword.v1.ImageGenerationService/Generate"
IMAGES_OF = "/oneword.v1.ImageGenerationService/"
JOBS = "/oneword.v1.ImageJobService/"
CONCEPTS = "/oneword.v1.ConceptService/"
TRAININGS = "/oneword.v1.TrainingService/"
SECRET = "<secret-cat>"


@pytest.fixture
async def acme(secured: Secured) -> Caller:
    return await secured.known("acme")


@pytest.fixture
async def rival(secured: Secured) -> Caller:
    return await secured.known("rival")


async def refused(caller: Caller, method: str, *requests: Message) -> tuple[Any, ...]:
    """All that a caller is told, less what is random or its own: code, text, details."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.call(method, *requests, timeout=TIMEOUT_S)
    return caught.value.code(), caught.value.details()


def import_of(token: str, value: float = 0.5, **fields: Any) -> concepts_pb2.ImportConceptRequest:
    content = concept_to_bytes(make_concept(token, value))
    return concepts_pb2.ImportConceptRequest(content=content, **fields)


async def import_by(caller: Caller, token: str, value: float = 0.5) -> concepts_pb2.Concept:
    (reply,) = await caller.call(f"{CONCEPTS}ImportConcept", import_of(token, value))
    assert reply.changed
    return reply.concept


async def listed(caller: Caller) -> list[str]:
    (reply,) = await caller.call(f"{CONCEPTS}ListConcepts", concepts_pb2.ListConceptsRequest())
    return [concept.placeholder_token for concept in reply.concepts]


# Concepts


async def test_a_concept_of_another_tenant_looks_like_one_that_is_not_there(
    acme: Caller, rival: Caller
) -> None:
    concept = await import_by(acme, SECRET)
    await import_by(rival, "<own>", 0.2)
    ours, none = {"placeholder_token": SECRET}, {"placeholder_token": "<never-cat>"}
    by_id, no_id = {"concept_id": concept.concept_id}, {"concept_id": "f" * 64}
    cases: list[tuple[str, Any, tuple[dict[str, str], ...]]] = [
        ("GetConcept", concepts_pb2.GetConceptRequest, (ours, none, by_id, no_id)),
        ("ExportConcept", concepts_pb2.ExportConceptRequest, (ours, none, by_id, no_id)),
        ("DeleteConcept", concepts_pb2.DeleteConceptRequest, (ours, none)),
        ("UndeleteConcept", concepts_pb2.UndeleteConceptRequest, (ours, none)),
        ("ListConceptVersions", concepts_pb2.ListConceptVersionsRequest, (ours, none)),
        ("SetConceptAlias", partial(concepts_pb2.SetConceptAliasRequest, alias="x"), (ours, none)),
        (
            "DeleteConceptAlias",
            partial(concepts_pb2.DeleteConceptAliasRequest, alias="x"),
            (ours, none),
        ),
    ]
    for method, kind, keys in cases:
        answers = set[tuple[Any, ...]]()
        for key in keys:
            code, text = await refused(rival, CONCEPTS + method, kind(**key))
            (value,) = key.values()
            answers.add((code, text.replace(repr(value), "WHAT")))
            assert "<own>" in text, "the caller's own names may be told"
        assert len(answers) == 1, method
        assert answers.pop()[0] == StatusCode.NOT_FOUND
    assert await listed(acme) == [SECRET]


async def test_versions_of_another_tenant_are_neither_seen_nor_brought_back(
    acme: Caller, rival: Caller
) -> None:
    """The same name of two tenants: versions, aliases, etags and deletions are each one's own."""
    first, second = await import_by(acme, "<cat>", 0.1), await import_by(rival, "<cat>", 0.2)
    await acme.call(
        f"{CONCEPTS}SetConceptAlias",
        concepts_pb2.SetConceptAliasRequest(placeholder_token="<cat>", alias="stable"),
    )
    versions = concepts_pb2.ListConceptVersionsRequest(placeholder_token="<cat>")
    (page,) = await rival.call(f"{CONCEPTS}ListConceptVersions", versions)
    assert [(v.concept_id, list(v.aliases)) for v in page.versions] == [(second.concept_id, [])]
    (page,) = await acme.call(f"{CONCEPTS}ListConceptVersions", versions)
    assert [(v.concept_id, list(v.aliases)) for v in page.versions] == [
        (first.concept_id, ["stable"])
    ]
    etag = page.versions[0].etag  # of acme, which is nothing to rival's name
    delete = concepts_pb2.DeleteConceptRequest(placeholder_token="<cat>", etag=etag)
    assert (await refused(rival, f"{CONCEPTS}DeleteConcept", delete))[0] == StatusCode.ABORTED
    await acme.call(f"{CONCEPTS}DeleteConcept", delete)
    undelete = concepts_pb2.UndeleteConceptRequest(placeholder_token="<cat>")
    code, _ = await refused(rival, f"{CONCEPTS}UndeleteConcept", undelete)
    assert code == StatusCode.ALREADY_EXISTS
    assert (await listed(acme), await listed(rival)) == ([], ["<cat>"])
    (reply,) = await acme.call(f"{CONCEPTS}UndeleteConcept", undelete)
    assert reply.concept.concept_id == first.concept_id


async def test_drawing_with_a_concept_of_another_tenant_is_drawing_with_none(
    acme: Caller, rival: Caller
) -> None:
    concept = await import_by(acme, SECRET)
    reference = generation_pb2.ConceptReference
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"prompt": f"a {SECRET}"}, {"prompt": "a <never-cat>"}),
        (
            {"negative_prompt": SECRET, "prompt": "a"},
            {"negative_prompt": "<never-cat>", "prompt": "a"},
        ),
        (
            {"concepts": [reference(concept_id=concept.concept_id)]},
            {"concepts": [reference(concept_id="f" * 64)]},
        ),
        (
            {"concepts": [reference(placeholder_token=SECRET)]},
            {"concepts": [reference(placeholder_token="<never-cat>")]},
        ),
    ]
    for ours, none in pairs:
        answers: list[tuple[Any, str]] = []
        for fields in (ours, none):
            code, text = await refused(rival, GENERATE, generation_pb2.GenerateRequest(**fields))
            assert code == StatusCode.NOT_FOUND
            answers.append((code, text[text.index(";") :]))  # behind the name
        assert answers[0] == answers[1]
        replies = await acme.call(
            GENERATE, generation_pb2.GenerateRequest(num_inference_steps=2, **ours)
        )
        assert replies[-1].HasField("summary")


async def test_tenants_have_the_same_names_without_meeting(acme: Caller, rival: Caller) -> None:
    first = await import_by(acme, "<cat>", 0.1)
    second = await import_by(rival, "<cat>", 0.2)  # no ALREADY_EXISTS, which would tell
    get = concepts_pb2.GetConceptRequest(placeholder_token="<cat>")
    for caller, concept in ((acme, first), (rival, second)):
        (reply,) = await caller.call(f"{CONCEPTS}GetConcept", get)
        assert reply.concept.concept_id == concept.concept_id
    delete = concepts_pb2.DeleteConceptRequest(placeholder_token="<cat>")
    await rival.call(f"{CONCEPTS}DeleteConcept", delete)
    assert (await listed(acme), await listed(rival)) == (["<cat>"], [])


async def test_the_same_vectors_of_two_tenants_are_two_concepts(
    acme: Caller, rival: Caller
) -> None:
    """The files are shared by content; deleting the one must leave the other."""
    first, second = await import_by(acme, "<cat>"), await import_by(rival, "<cat>")
    assert first.concept_id == second.concept_id
    delete = concepts_pb2.DeleteConceptRequest(placeholder_token="<cat>")
    await acme.call(f"{CONCEPTS}DeleteConcept", delete)
    export = concepts_pb2.ExportConceptRequest(placeholder_token="<cat>")
    (reply,) = await rival.call(f"{CONCEPTS}ExportConcept", export)
    assert reply.content
    assert (await refused(acme, f"{CONCEPTS}ExportConcept", export))[0] == StatusCode.NOT_FOUND


async def test_a_page_token_of_another_tenant_shows_ones_own(acme: Caller, rival: Caller) -> None:
    for token in ("<a>", "<b>", "<c>"):
        await import_by(acme, token)
    await import_by(rival, "<z>")
    (page,) = await acme.call(
        f"{CONCEPTS}ListConcepts", concepts_pb2.ListConceptsRequest(page_size=1)
    )
    (found,) = await rival.call(
        f"{CONCEPTS}ListConcepts",
        concepts_pb2.ListConceptsRequest(page_token=page.next_page_token),
    )
    assert [concept.placeholder_token for concept in found.concepts] == ["<z>"]


# Trainings


def create(token: str = SECRET, **fields: Any) -> list[training_pb2.CreateTrainingRequest]:
    spec = training_pb2.TrainingSpec(
        placeholder_token=token,
        options=training_pb2.LearnOptions(initializer_token=fields.pop("initializer", "")),
        **fields,
    )
    return list(create_requests(spec, IMAGES, {}, {}))


async def created(caller: Caller, *args: Any, **fields: Any) -> training_pb2.Training:
    requests = create(*args, **fields)
    (reply,) = await caller.call(f"{TRAININGS}CreateTraining", *requests, timeout=TIMEOUT_S)
    return reply.training


async def trainings_of(caller: Caller) -> list[str]:
    (reply,) = await caller.call(f"{TRAININGS}ListTrainings", training_pb2.ListTrainingsRequest())
    return [training.training_id for training in reply.trainings]


async def test_a_training_of_another_tenant_looks_like_one_that_is_not_there(
    secured: Secured, acme: Caller, rival: Caller
) -> None:
    training = await created(acme, initializer="hold", request_id="r-1")
    unknown = "0" * 32
    for method, kind in (
        ("GetTraining", training_pb2.GetTrainingRequest),
        ("WatchTraining", training_pb2.WatchTrainingRequest),
        ("CancelTraining", training_pb2.CancelTrainingRequest),
        ("DeleteTraining", training_pb2.DeleteTrainingRequest),
    ):
        answers = [
            await refused(rival, TRAININGS + method, kind(training_id=training_id))
            for training_id in (training.training_id, unknown)
        ]
        assert answers[0][0] == StatusCode.NOT_FOUND
        told = answers[0][1].replace(training.training_id, unknown)
        assert (answers[0][0], told) == answers[1], method
    assert await trainings_of(rival) == []
    assert await trainings_of(acme) == [training.training_id]

    # The same name and the same request id are free for others, and what they make is theirs.
    other = await created(rival, request_id="r-1")
    assert other.training_id != training.training_id
    assert await trainings_of(rival) == [other.training_id]
    cancel = training_pb2.CancelTrainingRequest(training_id=other.training_id)
    (reply,) = await rival.call(f"{TRAININGS}CancelTraining", cancel)
    assert reply.training.state == training_pb2.TRAINING_STATE_CANCELLED
    get = training_pb2.GetTrainingRequest(training_id=training.training_id)
    (reply,) = await acme.call(f"{TRAININGS}GetTraining", get)
    assert not reply.training.HasField("end_time")


async def test_what_is_learned_belongs_to_who_had_it_learned(
    secured: Secured, acme: Caller, rival: Caller
) -> None:
    training = await created(acme, "<cat>")
    watch = training_pb2.WatchTrainingRequest(training_id=training.training_id)
    states = await acme.call(f"{TRAININGS}WatchTraining", watch, timeout=TIMEOUT_S)
    assert states[-1].training.state == training_pb2.TRAINING_STATE_SUCCEEDED
    assert (await listed(acme), await listed(rival)) == (["<cat>"], [])
    assert secured.store.list(limit=5) == [], "nothing goes to the default tenant"
    folder = secured.credentials.parent / "trainings" / "jobs" / training.training_id
    assert json.loads((folder / "spec.json").read_text())["tenant"] == "acme"


# Other ways to ask for images, and jobs


def _named(prompt: str, request_id: str) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        prompt=prompt, request_id=request_id, num_inference_steps=2
    )


async def test_no_way_to_draw_reaches_a_concept_of_another_tenant(
    acme: Caller, rival: Caller
) -> None:
    await import_by(acme, SECRET)
    request = generation_pb2.GenerateRequest(prompt=f"a {SECRET}")
    unary = generation_pb2.GenerateImagesRequest(request=request)
    code, _ = await refused(rival, f"{IMAGES_OF}GenerateImages", unary)
    assert code == StatusCode.NOT_FOUND
    code, _ = await refused(
        rival, f"{JOBS}SubmitJob", generation_pb2.SubmitJobRequest(request=request)
    )
    assert code == StatusCode.NOT_FOUND
    batch = generation_pb2.GenerateBatchRequest(requests=[request])
    (reply,) = await rival.call(f"{IMAGES_OF}GenerateBatch", batch)
    assert reply.failure.code == StatusCode.NOT_FOUND.value[0]


async def test_a_request_id_of_another_tenant_answers_nothing_of_it(
    acme: Caller, rival: Caller
) -> None:
    first = await acme.call(GENERATE, _named("a cat", "same"))
    second = await rival.call(GENERATE, _named("a cat", "same"))
    assert not second[0].accepted.repeated
    assert first[0].accepted.seed != second[0].accepted.seed
    await acme.call(GENERATE, _named("a cat", "acme's"))
    await rival.call(GENERATE, _named("a dog", "acme's"))  # refused, if ids were shared


async def test_a_job_of_another_tenant_looks_like_one_that_is_not_there(
    acme: Caller, rival: Caller
) -> None:
    request = generation_pb2.GenerateRequest(prompt="a cat", num_inference_steps=2)
    (reply,) = await acme.call(f"{JOBS}SubmitJob", generation_pb2.SubmitJobRequest(request=request))
    cases: tuple[tuple[str, Any], ...] = (
        ("GetJob", generation_pb2.GetJobRequest),
        ("WatchJob", generation_pb2.WatchJobRequest),
        ("CancelJob", generation_pb2.CancelJobRequest),
        ("DeleteJob", generation_pb2.DeleteJobRequest),
    )
    for method, kind in cases:
        answers: list[tuple[Any, str]] = []
        for job_id in (reply.job.job_id, "0" * 32):
            code, text = await refused(rival, JOBS + method, kind(job_id=job_id))
            answers.append((code, text.replace(job_id, "ID")))
        assert answers[0] == answers[1] and answers[0][0] == StatusCode.NOT_FOUND, method
    (listing,) = await rival.call(f"{JOBS}ListJobs", generation_pb2.ListJobsRequest())
    assert not listing.jobs
    (own,) = await acme.call(f"{JOBS}ListJobs", generation_pb2.ListJobsRequest())
    assert [job.job_id for job in own.jobs] == [reply.job.job_id]


def test_a_training_from_before_there_were_tenants_is_the_default_ones() -> None:
    record = TrainingRecord(
        training_id="a", create_time=1.0, spec=TrainingSpec(placeholder_token="<a>"), images=()
    )
    fields = json.loads(record.to_json())
    del fields["tenant"]
    assert TrainingRecord.from_json(json.dumps(fields).encode()) == record
    assert record.tenant == "default"


def test_every_method_about_something_owned_is_tested_here() -> None:
    """A new one of these must be looked at: does it take the tenant of its caller?"""
    text = Path(__file__).read_text()
    for method, scope in SCOPE.items():
        if scope not in (None, Scope.ADMIN):  # bundles are the server's, of no tenant
            assert method.rpartition("/")[2] in text or method == GENERATE, method
