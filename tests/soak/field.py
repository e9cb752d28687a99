"""Where attacks take place: the server, who calls it, and the requests whose images are known."""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message
from grpc import StatusCode

from engine.concepts import Concept, concept_to_bytes
from engine.endpoint import MAX_MESSAGE_BYTES
from protos.oneword.v1 import concepts_pb2, generation_pb2
from protos.oneword.v1.generation_pb2 import GenerateRequest
from tests.security_setup import Caller
from tests.soak.ledger import Ledger
from tests.soak.process import INTRUDER, RESIDENTS, ServerProcess

DIM = 192  # of the embedded model
GENERATE = "/oneword.v1.ImageGenerationService/Generate"
GENERATE_IMAGES = "/oneword.v1.ImageGenerationService/GenerateImages"
GENERATE_BATCH = "/oneword.v1.ImageGenerationService/GenerateBatch"
JOBS = "/oneword.v1.ImageJobService/"
CONCEPTS = "/oneword.v1.ConceptService/"
INFO = "/oneword.v1.ServerInfoService/GetServerInfo"
HEALTH = "/grpc.health.v1.Health/"
CALL_S = 60.0  # far beyond what anything here takes, on a machine with other things to do
SMALL: dict[str, Any] = {"width": 32, "height": 32}  # a quarter of the work
SHARED_NAME = "<cat>"  # which each tenant has, with vectors of its own
# Each channel its own connections: gRPC would share those of equal channels.
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 2 * MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.max_metadata_size", 4 << 20),
]


def make_concept(token: str, value: float, *, note: str = "") -> Concept:
    vectors = np.random.default_rng(round(value * 1e6)).normal(0.0, 0.02, (2, DIM))
    metadata = {"note": note} if note else {}
    return Concept(
        placeholder_token=token,
        learned_embeddings=vectors.astype(np.float32),
        metadata=metadata,
    )


@dataclass
class Tenant:
    """A tenant: its token, its word that nobody else may see, and images that it knows."""

    name: str
    token: str
    word: str
    known: list[tuple[GenerateRequest, list[bytes]]] = field(
        default_factory=list[tuple[GenerateRequest, list[bytes]]]
    )


@dataclass(kw_only=True)
class Field:
    """The server and everybody around it."""

    server: ServerProcess
    ledger: Ledger
    tenants: dict[str, Tenant]
    chance: random.Random

    @classmethod
    def make(cls, server: ServerProcess, ledger: Ledger, seed: int) -> "Field":
        chance = random.Random(seed)
        tenants = dict[str, Tenant]()
        for name in (*RESIDENTS, INTRUDER):
            word = f"{name}word{chance.getrandbits(64):016x}"
            ledger.keep_secret(name, word)
            tenants[name] = Tenant(name=name, token=server.place.tokens[name], word=word)
        return cls(server=server, ledger=ledger, tenants=tenants, chance=chance)

    @property
    def intruder(self) -> Tenant:
        return self.tenants[INTRUDER]

    def channel(self, **options: Any) -> grpc.aio.Channel:
        authority = self.server.place.authority.read_bytes()
        more = [(f"grpc.{name}", value) for name, value in options.items()]
        return grpc.aio.secure_channel(
            self.server.target, grpc.ssl_channel_credentials(authority), [*OPTIONS, *more]
        )

    @asynccontextmanager
    async def caller(self, tenant: str | None, **options: Any) -> AsyncGenerator[Caller]:
        """Calls over a connection of its own; None: without a token."""
        metadata = (
            () if tenant is None else (("authorization", f"Bearer {self.tenants[tenant].token}"),)
        )
        async with self.channel(**options) as channel:
            yield Caller(channel, metadata)

    async def attempt(
        self, caller: Caller, who: str, method: str, *requests: Message, timeout: float = 10.0
    ) -> list[Any]:
        """An attacker's call, however it ends; what came is looked through for others' data."""
        replies = list[Any]()
        tenant = INTRUDER if caller.metadata else ""
        what = method.rpartition("/")[2]
        call = caller.start(method, *requests, timeout=timeout)
        try:
            async for reply in call:
                self.ledger.received(tenant, what, reply.SerializeToString())
                replies.append(reply)
            self.ledger.answered(who, StatusCode.OK, what)
        except grpc.aio.AioRpcError as error:
            self.ledger.refused(tenant, who, what, error)
        except BaseException:
            call.cancel()
            raise
        return replies

    def draw(self, **fields: Any) -> GenerateRequest:
        """A small request of the intruder's."""
        fields = {"num_inference_steps": 2, **({} if "init_image" in fields else SMALL), **fields}
        fields.setdefault("prompt", f"a cat {self.intruder.word}")
        return GenerateRequest(**fields)


def known_requests(tenant: Tenant) -> list[GenerateRequest]:
    """What a resident draws again and again: text, a concept, an inline one, two of a request."""
    word = tenant.word
    inline = generation_pb2.InlineConcept(
        safetensors=concept_to_bytes(make_concept("<mine>", len(word) + ord(word[0])))
    )
    return [
        GenerateRequest(prompt=f"a red heart, {word}", seed=1, num_inference_steps=3, **SMALL),
        GenerateRequest(
            prompt=f"a {SHARED_NAME}, {word}",
            seed=2,
            num_inference_steps=2,
            sampler="euler",
            **SMALL,
        ),
        GenerateRequest(
            prompt=f"a <mine> {word}",
            seed=3,
            num_inference_steps=2,
            concepts=[generation_pb2.ConceptReference(inline=inline)],
            **SMALL,
        ),
        GenerateRequest(
            prompt=f"a dog, {word}",
            negative_prompt="blue",
            seed=4,
            num_images=2,
            num_inference_steps=2,
            image_format=generation_pb2.IMAGE_FORMAT_WEBP,
            **SMALL,
        ),
    ]


async def settle(field: Field) -> None:
    """Store each tenant's concept, and learn on the idle server what its images are."""
    for tenant in field.tenants.values():
        async with field.caller(tenant.name) as caller:
            concept = make_concept(SHARED_NAME, 7.0 + len(tenant.name), note=tenant.word)
            content = concept_to_bytes(concept)
            await caller.call(
                f"{CONCEPTS}ImportConcept", concepts_pb2.ImportConceptRequest(content=content)
            )
            for request in known_requests(tenant):
                replies = await caller.call(GENERATE, request, timeout=CALL_S)
                pictures = pictures_of(replies)
                tenant.known.append((request, pictures))
                for picture in pictures:
                    field.ledger.keep_picture(tenant.name, picture)


def pictures_of(replies: Sequence[Any]) -> list[bytes]:
    images = [reply.image for reply in replies if reply.HasField("image")]
    return [image.image for image in sorted(images, key=lambda image: image.image_index)]


async def pause(chance: random.Random, most_s: float) -> None:
    """An attacker's own rhythm; nothing waits for it."""
    await asyncio.sleep(chance.random() * most_s)
