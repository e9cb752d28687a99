"""Calls as any client could make them: too many, too large, too short, never read, never meant."""

import asyncio
import random
from typing import Any

import grpc.aio

from protos.oneword.v1 import concepts_pb2, training_pb2
from protos.oneword.v1 import generation_pb2 as pb
from tests.security_setup import METHODS, Caller, sound_requests
from tests.soak.attacks.registry import attack
from tests.soak.field import (
    CONCEPTS,
    GENERATE,
    GENERATE_BATCH,
    GENERATE_IMAGES,
    HEALTH,
    INFO,
    INTRUDER,
    JOBS,
    Field,
    pause,
)

WHO = INTRUDER


@attack(6)
async def impossible_parameters(field: Field, chance: random.Random) -> None:
    """Numbers at and beyond every edge."""
    edges: dict[str, list[Any]] = {
        "num_inference_steps": [0, 101, 2**31, 10**9, 2**32 - 1],
        "width": [0, 1, 7, 63, 10**6, 2**32 - 1],
        "height": [0, 65, 10**6],
        "num_images": [0, 17, 2**32 - 1],
        "guidance_scale": [float("nan"), float("inf"), -1.0, 1e30, 5e-324, -0.0],
        "seed": [2**63, 2**64 - 1],
        "strength": [float("nan"), 0.0, 2.0, -1.0],
        "sampler": ["", "none", "../../x", "x" * 100_000, "\0"],
        "preview_every_steps": [1001, 2**32 - 1],
        "priority": [10, 2**32 - 1],
        "request_id": ["x" * 65, "\n", "\u202e", "\x1b[2J"],
        "image_format": [77],
    }
    async with field.caller(WHO) as caller:
        for _ in range(12):
            name = chance.choice(list(edges))
            request = field.draw(**{name: chance.choice(edges[name])})
            await field.attempt(caller, WHO, GENERATE, request)


@attack(3, 6, 18)
async def hostile_prompts(field: Field, chance: random.Random) -> None:
    """Text that is long, nested, invisible, forged, or names what there is not."""
    word = field.intruder.word
    texts = [
        "a" * 20_001, "\0" * 500, "<a>" * 6000, "<cat>" * 900, "(" * 5000 + word, "((((x:1.5):1.5)",
        "(x:nan)", "(x:1e308)", "[" * 300, "\\" * 4001, "<cat", "<cat>2", "<<cat>>", "<ca\u200bt>",
        "\u202e<cat>\u202c", f"\nERROR {word}\x1b[2J", "\r\n" * 400, "\ud7ff\ufffe\U0010ffff",
        "".join(chr(chance.randrange(32, 0xD800)) for _ in range(900)), "e\u0301" * 3000,
        "<../../etc/passwd>", "<%2e%2e>", "<con>", "\N{CAT FACE}" * 2000, "cat " * 4000,
    ]  # fmt: skip
    async with field.caller(WHO) as caller:
        for text in chance.sample(texts, 10):
            part = chance.choice(["prompt", "negative_prompt"])
            await field.attempt(caller, WHO, GENERATE, field.draw(**{part: text}))


@attack(6, 8)
async def oversized_messages(field: Field, chance: random.Random) -> None:
    """Up to and beyond the limit of a message."""
    async with field.caller(WHO) as caller:
        for megabytes in chance.sample([1, 15, 17, 31], 2):
            request = field.draw(init_image=bytes(megabytes << 20))
            await field.attempt(caller, WHO, GENERATE, request)
        await field.attempt(caller, WHO, GENERATE, field.draw(prompt="x" * (10 << 20)))


@attack(9)
async def cancel_storm(field: Field, chance: random.Random) -> None:
    """Calls that are left anywhere: in the queue, in the first step, in the last, while writing."""
    async with field.caller(WHO) as caller:

        async def leave() -> None:
            request = field.draw(
                num_images=chance.randint(1, 4),
                num_inference_steps=chance.choice([1, 5, 100]),
                preview_every_steps=chance.choice([0, 1]),
                request_id=chance.choice(["", f"storm-{chance.randrange(5)}"]),
            )
            call = caller.start(GENERATE, request, timeout=10.0)
            try:
                for _ in range(chance.randrange(6)):
                    await call.read()
                await pause(chance, 0.1)
            except grpc.aio.AioRpcError as error:
                field.ledger.refused(WHO, WHO, "Generate", error)
            call.cancel()

        for _ in range(5):
            await asyncio.gather(*(leave() for _ in range(30)))


@attack(8)
async def streams_that_nobody_reads(field: Field, chance: random.Random) -> None:
    """Streams of previews whose caller reads one event and no more."""
    options = {"http2.bdp_probe": 0, "http2.lookahead_bytes": 1 << 14}
    async with field.caller(WHO, **options) as caller:
        calls = [
            caller.start(
                GENERATE,
                field.draw(num_images=8, num_inference_steps=30, preview_every_steps=1),
                timeout=10.0,
            )
            for _ in range(8)
        ]
        await asyncio.sleep(1.0 + chance.random())
        for call in calls:
            call.cancel()


@attack(8, 10)
async def connection_churn(field: Field, chance: random.Random) -> None:
    """Connections for one call, or none, and watchers that leave theirs open."""

    async def once() -> None:
        known = chance.random() < 0.5
        async with field.caller(WHO if known else None) as caller:
            method = chance.choice([INFO, f"{HEALTH}Watch"])
            call = caller.start(method, *sound_requests(method), timeout=10.0)
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                field.ledger.refused(WHO if known else "", "stranger", method, error)
        # The channel ends with the call under way.

    for _ in range(3):
        await asyncio.gather(*(once() for _ in range(10)))


@attack(10)
async def hopeless_deadlines(field: Field, chance: random.Random) -> None:
    """Too short to be met, or just about."""
    async with field.caller(WHO) as caller:
        for _ in range(30):
            timeout = chance.choice([1e-9, 0.001, 0.01, 0.05, 0.3])
            request = field.draw(num_inference_steps=chance.choice([1, 20, 100]))
            await field.attempt(caller, WHO, GENERATE, request, timeout=timeout)


@attack(11)
async def token_guessing(field: Field, chance: random.Random) -> None:
    """Tokens that nearly are, on every method."""
    sound = field.intruder.token
    prefix, token_id, secret = sound.split("_")
    async with field.channel() as channel:
        for _ in range(60):
            at = chance.randrange(len(secret))
            other = secret[:at] + chance.choice("abcdefgh234567") + secret[at + 1 :]
            guesses = [f"{prefix}_{token_id}_{other}x", f"{prefix}_{secret[:16]}_{secret}",
                       sound.upper(), sound[:-1], "ow__", "x" * 5000]  # fmt: skip
            header = f"Bearer {chance.choice(guesses)}"
            method = chance.choice([one for one in METHODS if not one.startswith(HEALTH)])
            stranger = Caller(channel, (("authorization", header),))
            replies = await field.attempt(stranger, "guesser", method, *sound_requests(method))
            if replies:
                field.ledger.violation(f"{method} answered a caller with a wrong token")


@attack(11)
async def metadata_bombs(field: Field, chance: random.Random) -> None:
    """Headers that are many, long or binary."""
    token = ("authorization", f"Bearer {field.intruder.token}")
    bombs: list[tuple[tuple[str, Any], ...]] = [
        tuple((f"x-{number}", "v" * 50) for number in range(300)),
        (("x-long", "v" * 200_000),),
        (("x-bytes-bin", chance.randbytes(6000)),),
        (("x-request-id", "a" * 7000),),
        (("x-request-id", "../../x"), ("x-request-id", "y")),
        (("traceparent", "00-zz"), ("tracestate", "a=" + "b" * 5000)),
        tuple(("authorization", f"Bearer {number}") for number in range(50)),
    ]
    async with field.channel() as channel:
        for bomb in bombs:
            caller = Caller(channel, (token, *bomb))
            await field.attempt(caller, WHO, INFO, *sound_requests(INFO))


@attack(7)
async def greed(field: Field, chance: random.Random) -> None:
    """As much work at once as there is room for, at the highest priority."""
    async with field.caller(WHO) as caller:

        async def grab() -> None:
            request = field.draw(
                num_images=8, num_inference_steps=20, width=128, height=128, priority=9
            )
            method = chance.choice([GENERATE, GENERATE_IMAGES])
            message: Any = request
            if method == GENERATE_IMAGES:
                message = pb.GenerateImagesRequest(request=request)
            await field.attempt(caller, WHO, method, message, timeout=3.0)

        await asyncio.gather(*(grab() for _ in range(20)))


@attack(7, 13)
async def batches_of_rubbish(field: Field, chance: random.Random) -> None:
    """Many requests in a call, few of them sound, some under the same id."""
    items = [
        field.draw(
            num_inference_steps=chance.choice([0, 1, 1000]),
            request_id=chance.choice(["", "one", "\n", "two"]),
            prompt=chance.choice(["a <nobody>", field.intruder.word, ""]),
        )
        for _ in range(chance.choice([100, 257]))
    ]
    async with field.caller(WHO) as caller:
        batch = pb.GenerateBatchRequest(requests=items)
        await field.attempt(caller, WHO, GENERATE_BATCH, batch, timeout=3.0)


@attack(7, 14)
async def job_floods(field: Field, chance: random.Random) -> None:
    """Jobs until there is no room, watched by nobody, cancelled in disorder."""
    async with field.caller(WHO) as caller:
        made = list[str]()
        for _ in range(30):
            request = field.draw(num_images=4, num_inference_steps=100)
            replies = await field.attempt(
                caller, WHO, f"{JOBS}SubmitJob", pb.SubmitJobRequest(request=request)
            )
            made += [reply.job.job_id for reply in replies]
        chance.shuffle(made)
        watches = [
            caller.start(f"{JOBS}WatchJob", pb.WatchJobRequest(job_id=job_id), timeout=10.0)
            for job_id in made[:5]
        ]
        await clear_jobs(field, caller)
        for watch in watches:
            watch.cancel()


async def clear_jobs(field: Field, caller: Caller) -> None:
    """Cancel and delete all that the intruder has."""
    (listed,) = await field.attempt(
        caller, WHO, f"{JOBS}ListJobs", pb.ListJobsRequest(page_size=1000)
    ) or [pb.ListJobsResponse()]
    for job in listed.jobs:
        cancel = pb.CancelJobRequest(job_id=job.job_id)
        await field.attempt(caller, WHO, f"{JOBS}CancelJob", cancel)
        delete = pb.DeleteJobRequest(job_id=job.job_id)
        await field.attempt(caller, WHO, f"{JOBS}DeleteJob", delete)


@attack(5, 6)
async def messages_of_another_kind(field: Field, chance: random.Random) -> None:
    """Bytes that are no message of the method, and messages in the place of others."""
    async with field.caller(WHO) as caller:
        for _ in range(15):
            method = chance.choice([one for one in METHODS if not one.startswith(HEALTH)])
            if chance.random() < 0.5:
                noise = _Bytes(chance.randbytes(chance.randrange(400)))
                await field.attempt(caller, WHO, method, noise, timeout=3.0)  # pyright: ignore[reportArgumentType]
            else:
                other = sound_requests(chance.choice(METHODS))
                await field.attempt(caller, WHO, method, *other, *other, timeout=3.0)


class _Bytes:
    """What a stub serializes, without sense."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def SerializeToString(self) -> bytes:
        return self._content


@attack(5, 20)
async def trainings_where_nothing_is_learned(field: Field, chance: random.Random) -> None:
    """Uploads to a server that cannot learn, whole and broken off."""
    method = "/oneword.v1.TrainingService/CreateTraining"
    async with field.caller(WHO) as caller:
        await field.attempt(caller, WHO, method, *sound_requests(method), timeout=5.0)
        await field.attempt(caller, WHO, method, timeout=5.0)
        chunk = training_pb2.CreateTrainingRequest()
        await field.attempt(caller, WHO, method, *[chunk] * 100, timeout=5.0)
        for name in ("Get", "Watch", "Cancel", "Delete"):
            one = f"/oneword.v1.TrainingService/{name}Training"
            await field.attempt(caller, WHO, one, *sound_requests(one), timeout=5.0)


@attack(3, 6)
async def strange_pages(field: Field, chance: random.Random) -> None:
    """Page tokens and ids that nobody was given."""
    odd = ["", "x", "\0" * 50, "../..", "9" * 400, "\u202e", "A" * 9000, "e30=", "bnVsbA=="]
    async with field.caller(WHO) as caller:
        for text in odd:
            size = chance.choice([-1, 0, 1, 1000, 1001, 2**31 - 1])
            page: dict[str, Any] = {"page_size": size, "page_token": text}
            await field.attempt(
                caller, WHO, f"{CONCEPTS}ListConcepts", concepts_pb2.ListConceptsRequest(**page)
            )
            await field.attempt(caller, WHO, f"{JOBS}ListJobs", pb.ListJobsRequest(**page))
            await field.attempt(caller, WHO, f"{JOBS}GetJob", pb.GetJobRequest(job_id=text))
