"""Requests of all kinds for the heap: cheap ones, a third cancelled, a sixth broken."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from engine.concepts import Concept, concept_to_bytes
from protos.oneword.v1.concepts_pb2 import DeleteConceptRequest, ImportConceptRequest
from protos.oneword.v1.concepts_pb2_grpc import ConceptServiceStub
from protos.oneword.v1.generation_pb2 import (
    ConceptReference,
    GenerateBatchRequest,
    GenerateImagesRequest,
    GenerateRequest,
    InlineConcept,
)
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub

SIDE = 16  # pixels: the less an image costs, the more requests there is time for
MAX_STEPS = 4
NUM_PROMPTS = 50  # few enough for the cache of encoded prompts to be full at once
CONCURRENCY = 8
MAX_CANCEL_S = 0.1
# What callers do, in shares; the names are counted in the report.
SHARES = {
    "streamed": 0.22,
    "unary": 0.15,
    "batch": 0.06,
    "inline concept": 0.04,
    "stored concept": 0.02,
    "cancelled": 0.34,
    "invalid": 0.05,
    "too large": 0.03,
    "garbage": 0.04,
    "deadline": 0.05,
}
_METHOD = "/oneword.v1.ImageGenerationService/Generate"

Action = Callable[[], Awaitable[None]]


class Traffic:
    """One caller's connection, and what he does on it."""

    def __init__(self, channel: grpc.aio.Channel, concept: Concept, max_message_bytes: int) -> None:
        generation: Any = ImageGenerationServiceStub(channel)
        concepts: Any = ConceptServiceStub(channel)
        self._generation, self._concepts = generation, concepts
        # Bytes as they are: the server gets what it cannot parse.
        self._raw: Any = channel.unary_stream(_METHOD)
        self._content = concept_to_bytes(concept)
        self._token = concept.placeholder_token
        self._large = "x" * (max_message_bytes + 1024)
        self._chance = random.Random(0)
        self._number = 0
        self.codes: Counter[str] = Counter()  # how the calls ended

    async def send(self, count: int) -> None:
        """`count` requests, `CONCURRENCY` at a time."""
        kinds = self._chance.choices(list(SHARES), list(SHARES.values()), k=count)
        waiting = iter(kinds)

        async def work() -> None:
            for kind in waiting:
                await self._do(kind)

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))

    async def _do(self, kind: str) -> None:
        actions: dict[str, Action] = {
            "streamed": lambda: self._read(self._generation.Generate(self._request(preview=True))),
            "unary": self._unary,
            "batch": self._batch,
            "inline concept": lambda: self._read(self._generation.Generate(self._with_concept())),
            "stored concept": self._store_and_draw,
            "cancelled": self._cancel,
            "invalid": lambda: self._read(self._generation.Generate(self._invalid())),
            "too large": lambda: self._read(
                self._generation.Generate(GenerateRequest(prompt=self._large))
            ),
            "garbage": lambda: self._read(self._raw(self._chance.randbytes(200))),
            "deadline": lambda: self._read(
                self._generation.Generate(
                    self._request(), timeout=self._chance.uniform(0.0005, 0.01)
                )
            ),
        }
        try:
            await actions[kind]()
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        except asyncio.CancelledError:  # of the call, not of this task: nobody cancels that
            code = "CANCELLED"
        self.codes[f"{kind}: {code}"] += 1

    def _request(self, *, preview: bool = False) -> GenerateRequest:
        self._number += 1
        return GenerateRequest(
            prompt=f"a photo of a dog number {self._number % NUM_PROMPTS}",
            width=SIDE,
            height=SIDE,
            seed=self._number,
            num_inference_steps=1 + self._number % MAX_STEPS,
            guidance_scale=1.0 if self._number % 2 else 4.0,
            preview_every_steps=1 if preview else 0,
        )

    def _invalid(self) -> GenerateRequest:
        request = self._request()
        field, value = self._chance.choice(
            [("num_inference_steps", 0), ("sampler", "none"), ("guidance_scale", float("nan")),
             ("width", 7), ("num_images", 1000), ("prompt", "a <nobody-knows-this>")]
        )  # fmt: skip
        setattr(request, field, value)
        return request

    def _with_concept(self) -> GenerateRequest:
        request = self._request()
        request.prompt = f"a photo of {self._token}"
        request.concepts.append(ConceptReference(inline=InlineConcept(safetensors=self._content)))
        return request

    async def _unary(self) -> None:
        await self._generation.GenerateImages(GenerateImagesRequest(request=self._request()))

    async def _batch(self) -> None:
        requests = [self._request(), self._invalid(), self._request()]
        await self._read(self._generation.GenerateBatch(GenerateBatchRequest(requests=requests)))

    async def _store_and_draw(self) -> None:
        request = self._request()
        token = f"<stored-{request.seed}>"
        await self._concepts.ImportConcept(
            ImportConceptRequest(content=self._content, placeholder_token=token)
        )
        request.prompt = f"a photo of {token}"
        await self._read(self._generation.Generate(request))
        await self._concepts.DeleteConcept(DeleteConceptRequest(placeholder_token=token))

    async def _cancel(self) -> None:
        request = self._request()
        request.num_inference_steps = 20 * request.num_inference_steps  # so that some of it is left
        call = self._generation.Generate(request)
        timer = asyncio.get_running_loop().call_later(
            self._chance.uniform(0.0, MAX_CANCEL_S), call.cancel
        )
        try:
            await self._read(call)
        finally:
            timer.cancel()

    async def _read(self, call: Any) -> None:
        async for _ in call:
            pass
