"""Tenants who use the server well, and look closely at what they get."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from grpc import StatusCode

from engine.client import AsyncClient, ClientSecurity, ServerError
from engine.concepts import concept_to_bytes
from protos.oneword.v1 import concepts_pb2
from protos.oneword.v1 import generation_pb2 as pb
from protos.oneword.v1.generation_pb2 import GenerateRequest
from tests.security_setup import Caller
from tests.soak.field import (
    CALL_S,
    CONCEPTS,
    GENERATE,
    GENERATE_BATCH,
    GENERATE_IMAGES,
    JOBS,
    SHARED_NAME,
    Field,
    Tenant,
    make_concept,
    pictures_of,
)


class Resident:
    """One tenant's calls, one after another; each image must be the one it is on an idle server."""

    def __init__(self, field: Field, tenant: Tenant, chance: random.Random) -> None:
        self._field = field
        self._ledger = field.ledger
        self._tenant = tenant
        self._chance = chance
        self._number = 0

    async def live(self, until: asyncio.Event) -> None:
        """Call the server until told to stop; whatever it answers, go on."""
        async with self._field.caller(self._tenant.name) as caller:
            acts: list[Callable[[Caller], Awaitable[None]]] = [
                self._draw, self._draw, self._draw_in_one, self._draw_by_the_batch,
                self._draw_again, self._have_a_job, self._keep_a_concept, self._look_around,
            ]  # fmt: skip
            while not until.is_set():
                act = self._chance.choice(acts)
                began = time.monotonic()
                try:
                    await act(caller)
                    self._ledger.answered(self._tenant.name, StatusCode.OK, act.__name__)
                    self._ledger.latencies_s.append(time.monotonic() - began)
                except grpc.aio.AioRpcError as error:
                    self._ledger.resident_refused(self._tenant.name, act.__name__, error)
                    await asyncio.sleep(0.2)

    async def live_by_client(self, until: asyncio.Event) -> None:
        """The same with the client that people use, which waits out what passes."""
        security = ClientSecurity(
            token=self._tenant.token, tls_ca=self._field.server.place.authority
        )
        async with AsyncClient(
            self._field.server.target, timeout_s=CALL_S, security=security
        ) as client:
            while not until.is_set():
                request, expected = self._chance.choice(self._tenant.known)
                try:
                    result = await client.generate(request)
                except ServerError as error:
                    self._client_refused(error)
                else:
                    self._ledger.answered(self._tenant.name, StatusCode.OK, "the client")
                    self._check(result.images, expected, "the client")

    def _client_refused(self, error: ServerError) -> None:
        """After all its attempts; so only around a fault."""
        self._ledger.answered(self._tenant.name, error.code, f"the client ({error})")
        if self._ledger.dropped_in_flood(error.code, str(error)):
            return
        if not (error.code is StatusCode.UNAVAILABLE and self._ledger.in_fault):
            self._ledger.violation(f"the client of {self._tenant.name} failed: {error}")

    # Images

    async def _draw(self, caller: Caller) -> None:
        request, expected = self._chance.choice(self._tenant.known)
        replies = await self._call(caller, GENERATE, request)
        self._check(pictures_of(replies), expected, "Generate")

    async def _draw_in_one(self, caller: Caller) -> None:
        request, expected = self._chance.choice(self._tenant.known)
        (answer,) = await self._call(
            caller, GENERATE_IMAGES, pb.GenerateImagesRequest(request=request)
        )
        self._check([image.image for image in answer.images], expected, "GenerateImages")

    async def _draw_by_the_batch(self, caller: Caller) -> None:
        known = self._chance.choices(self._tenant.known, k=3)
        batch = pb.GenerateBatchRequest(requests=[request for request, _ in known])
        replies = await self._call(caller, GENERATE_BATCH, batch)
        for index, (_, expected) in enumerate(known):
            own = [reply for reply in replies if reply.index == index]
            if failures := [reply.failure for reply in own if reply.HasField("failure")]:
                self._check_failure(failures[0], "an item of GenerateBatch")
                continue
            self._check(pictures_of([reply.response for reply in own]), expected, "GenerateBatch")

    async def _draw_again(self, caller: Caller) -> None:
        """Under an id, twice at once: drawn once, told alike."""
        request, expected = self._chance.choice(self._tenant.known)
        named = _named(request, self._next_id())
        answers = await asyncio.gather(
            *(self._call(caller, GENERATE, named) for _ in range(2)), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            self._check(pictures_of(answer), expected, "a repeated Generate")

    async def _have_a_job(self, caller: Caller) -> None:
        request, expected = self._chance.choice(self._tenant.known)
        submit = pb.SubmitJobRequest(request=_named(request, self._next_id()))
        (submitted,) = await self._call(caller, f"{JOBS}SubmitJob", submit)
        job_id = submitted.job.job_id
        watch = pb.WatchJobRequest(job_id=job_id, with_images=True)
        replies = await self._call(caller, f"{JOBS}WatchJob", watch)
        job = [reply.job for reply in replies if reply.HasField("job")][-1]
        if job.state == pb.JOB_STATE_FAILED:
            self._check_failure(job.failure, "a job")
        else:
            self._check(pictures_of(replies), expected, "a job")
        await self._call(caller, f"{JOBS}DeleteJob", pb.DeleteJobRequest(job_id=job_id))

    # Concepts

    async def _keep_a_concept(self, caller: Caller) -> None:
        token = f"<own-{self._chance.randrange(3)}>"
        content = concept_to_bytes(
            make_concept(token, self._chance.random(), note=self._tenant.word)
        )
        request = concepts_pb2.ImportConceptRequest(content=content, overwrite=True)
        await self._call(caller, f"{CONCEPTS}ImportConcept", request)
        export = concepts_pb2.ExportConceptRequest(placeholder_token=token)
        (exported,) = await self._call(caller, f"{CONCEPTS}ExportConcept", export)
        if exported.content != content:
            self._ledger.violation(f"{self._tenant.name} got another concept than it had stored")
        delete = concepts_pb2.DeleteConceptRequest(placeholder_token=token)
        await self._call(caller, f"{CONCEPTS}DeleteConcept", delete)

    async def _look_around(self, caller: Caller) -> None:
        """Nothing of anybody else's is listed."""
        (listed,) = await self._call(
            caller, f"{CONCEPTS}ListConcepts", concepts_pb2.ListConceptsRequest()
        )
        names = {concept.placeholder_token for concept in listed.concepts}
        if SHARED_NAME not in names or not names <= {
            SHARED_NAME,
            *(f"<own-{i}>" for i in range(3)),
        }:
            self._ledger.violation(f"{self._tenant.name} was listed concepts that are not its own")
        (jobs,) = await self._call(caller, f"{JOBS}ListJobs", pb.ListJobsRequest())
        if any(self._tenant.word not in job.request.prompt for job in jobs.jobs):
            self._ledger.violation(f"{self._tenant.name} was listed jobs that are not its own")

    # What all have in common

    async def _call(self, caller: Caller, method: str, request: Any) -> list[Any]:
        replies = await caller.call(method, request, timeout=CALL_S)
        what = method.rpartition("/")[2]
        for reply in replies:
            self._ledger.received(self._tenant.name, what, reply.SerializeToString())
        return replies

    def _check(self, pictures: list[bytes], expected: list[bytes], what: str) -> None:
        for picture in pictures:
            self._ledger.received_picture(self._tenant.name, what, picture)
        if pictures != expected:
            self._ledger.violation(
                f"images of {what} for {self._tenant.name} are not those of the idle server: "
                f"{len(pictures)} of {len(expected)}"
            )

    def _check_failure(self, failure: pb.Failure, what: str) -> None:
        """What failed without failing a call: the same rules."""
        code = next(code for code in StatusCode if code.value[0] == failure.code)
        self._ledger.answered(self._tenant.name, code, f"{what} ({failure.message})")
        in_order = (code is StatusCode.UNAVAILABLE and self._ledger.in_fault) or (
            code is StatusCode.RESOURCE_EXHAUSTED and failure.HasField("retry_after_s")
        )
        if not in_order:
            self._ledger.violation(f"{what} of {self._tenant.name} failed: {failure.message}")

    def _next_id(self) -> str:
        self._number += 1
        return f"{self._tenant.name}-{self._number}"


def _named(request: GenerateRequest, request_id: str) -> GenerateRequest:
    named = GenerateRequest()
    named.CopyFrom(request)
    named.request_id = request_id
    return named
