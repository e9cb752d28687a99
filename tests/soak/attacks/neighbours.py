"""One tenant after what is another's: names, ids, jobs, request ids, and what errors give away."""

import asyncio
import random
from typing import Any

from protos.oneword.v1 import concepts_pb2
from protos.oneword.v1 import generation_pb2 as pb
from tests.soak.attacks.registry import attack
from tests.soak.field import CONCEPTS, GENERATE, INTRUDER, JOBS, Field, make_concept
from tests.soak.process import RESIDENTS

WHO = INTRUDER


@attack(12)
async def concepts_of_others(field: Field, chance: random.Random) -> None:
    """By the names and ids that the others' concepts have."""
    victim = field.tenants[chance.choice(RESIDENTS)]
    known = make_concept("<cat>", 7.0 + len(victim.name)).concept_id
    keys: list[dict[str, Any]] = [
        {"placeholder_token": f"<own-{chance.randrange(3)}>"},
        {"concept_id": known},
        {"placeholder_token": f"<cat>@sha256:{known}"},
    ]
    async with field.caller(WHO) as caller:
        for key in keys:
            for method, kind in (
                ("GetConcept", concepts_pb2.GetConceptRequest),
                ("ExportConcept", concepts_pb2.ExportConceptRequest),
            ):
                request: Any = kind(**key)
                if await field.attempt(caller, WHO, CONCEPTS + method, request):
                    field.ledger.violation(f"{method} gave a concept of {victim.name}'s: {key}")
        reference = pb.ConceptReference(concept_id=known)
        if await field.attempt(caller, WHO, GENERATE, field.draw(concepts=[reference])):
            field.ledger.violation(f"a concept of {victim.name}'s was drawn by its id")


@attack(12, 13)
async def request_ids_of_others(field: Field, chance: random.Random) -> None:
    """The very ids that residents use now, with bodies of the intruder's own."""
    async with field.caller(WHO) as caller:
        for _ in range(20):
            name = f"{chance.choice(RESIDENTS)}-{chance.randrange(40)}"
            replies = await field.attempt(caller, WHO, GENERATE, field.draw(request_id=name))
            for reply in replies:
                if reply.HasField("image"):
                    field.ledger.received_picture(WHO, "Generate", reply.image.image)


@attack(12)
async def jobs_of_others(field: Field, chance: random.Random) -> None:
    """By ids that exist, as far as they can be guessed, and by what lists hold."""
    async with field.caller(WHO) as caller:
        for _ in range(10):
            job_id = f"{chance.getrandbits(128):032x}"
            for method, kind in (
                ("GetJob", pb.GetJobRequest),
                ("CancelJob", pb.CancelJobRequest),
                ("DeleteJob", pb.DeleteJobRequest),
                ("WatchJob", pb.WatchJobRequest),
            ):
                await field.attempt(caller, WHO, JOBS + method, kind(job_id=job_id))
        # `attempt` looks through what comes for others' words.
        await field.attempt(caller, WHO, f"{JOBS}ListJobs", pb.ListJobsRequest(page_size=1000))


@attack(13)
async def one_id_for_many(field: Field, chance: random.Random) -> None:
    """The same id at once, with the same and with other bodies: one execution, one body."""
    name = f"many-{chance.getrandbits(32)}"
    async with field.caller(WHO) as caller:
        answers = await asyncio.gather(
            *(
                field.attempt(
                    caller, WHO, GENERATE,
                    field.draw(request_id=name, num_inference_steps=chance.choice([2, 2, 3])),
                )
                for _ in range(30)
            )
        )  # fmt: skip
    pictures = {
        reply.image.image for replies in answers for reply in replies if reply.HasField("image")
    }
    if len(pictures) > 2:  # two, where the first body was forgotten after a failure
        field.ledger.violation(f"one request id has {len(pictures)} different images")
