"""Rounds of attacks and truces, from the first image to the last reading."""

import asyncio
import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import grpc.aio

from protos.oneword.v1.server_info_pb2 import GetServerInfoRequest
from tests.soak.attacks import calls, contents, faults, neighbours, wire
from tests.soak.attacks.calls import clear_jobs
from tests.soak.attacks.registry import ATTACKS, Attack
from tests.soak.field import INFO, Field, settle
from tests.soak.gauges import Reading
from tests.soak.judge import LogWatch, judge_readings, secrets_of
from tests.soak.residents import Resident

assert all((calls, contents, faults, neighbours, wire))  # they register what they have
LANES = 4  # attacks at the same time
ATTACK_S = 90.0  # far more than any takes
CALM_S = 60.0  # for a server to come to rest once nobody asks


@dataclass
class Campaign:
    """A soak of some minutes against one server."""

    field: Field
    minutes: float
    tell: Callable[[str], None] = print
    readings: list[Reading] = dataclasses.field(default_factory=list[Reading])
    dealt: Counter[str] = dataclasses.field(default_factory=Counter[str])
    rounds: int = 0

    def __post_init__(self) -> None:
        place = self.field.server.place
        self._log = LogWatch([*secrets_of(place.tokens.values()), *self.field.ledger.secrets])
        self._deck: list[Attack] = []

    async def run(self) -> None:
        """Fight until the time is over; what was seen is in the ledger."""
        await settle(self.field)
        ends = time.monotonic() + 60.0 * self.minutes
        # Enough truces for a trend, however short the soak.
        round_s = min(20.0, max(2.0, 60.0 * self.minutes / 10))
        while time.monotonic() < ends and self.field.server.alive:
            await self._fight(round_s)
            await self._truce()
        for problem in judge_readings(self.readings):
            self.field.ledger.violation(problem)

    def look_at_log(self) -> None:
        for problem in self._log.look(self.field.server.place.log.read_bytes()):
            self.field.ledger.violation(problem)

    async def _fight(self, seconds: float) -> None:
        """The residents live, and attacks come by, until the time of a round is over."""
        stop = asyncio.Event()
        chance = self.field.chance
        seed = chance.getrandbits(32)
        residents = [
            Resident(self.field, tenant, random.Random(seed + number))
            for number, tenant in enumerate(self.field.tenants.values())
            if tenant is not self.field.intruder
        ]
        async with asyncio.TaskGroup() as group:
            for resident in residents:
                group.create_task(resident.live(stop))
                group.create_task(resident.live_by_client(stop))
            lanes = [
                group.create_task(self._lane(time.monotonic() + seconds)) for _ in range(LANES)
            ]
            await asyncio.wait(lanes)
            stop.set()
        self.rounds += 1

    async def _lane(self, ends: float) -> None:
        while time.monotonic() < ends and self.field.server.alive:
            attack = self._deal()
            self.dealt[attack.name] += 1
            try:
                async with asyncio.timeout(ATTACK_S):
                    await attack.run(self.field, random.Random(self.field.chance.getrandbits(64)))
            except TimeoutError:
                self.field.ledger.violation(f"{attack.name} had no answer for {ATTACK_S:g} s")

    def _deal(self) -> Attack:
        if not self._deck:
            self._deck = list(ATTACKS.values())
            self.field.chance.shuffle(self._deck)
        return self._deck.pop()

    async def _truce(self) -> None:
        """Nobody asks for anything: the server must come to rest, and be as it was before."""
        if not self.field.server.alive:
            self.field.ledger.violation("the server's process has ended")
            return
        await faults.until_serving(self.field, "a round")
        async with self.field.caller(self.field.intruder.name) as caller:
            await clear_jobs(self.field, caller)
            await self._until_idle()
        reading = dataclasses.replace(await self._at_rest(), given_up=self.field.ledger.given_up)
        self.readings.append(reading)
        self.look_at_log()
        self.tell(
            f"{reading.at_s:6.1f} s  heap {reading.heap_bytes / 2**20:7.2f} MiB  "
            f"resident {reading.resident_bytes / 2**20:6.1f} MiB  "
            f"descriptors {reading.descriptors}  threads {reading.threads}  "
            f"tasks {reading.tasks}  violations {len(self.field.ledger.violations)}"
        )

    async def _until_idle(self) -> None:
        ends = time.monotonic() + CALM_S
        async with self.field.caller(self.field.intruder.name) as caller:
            while time.monotonic() < ends:
                with suppress(grpc.aio.AioRpcError):
                    (info,) = await caller.call(INFO, GetServerInfoRequest(), timeout=10.0)
                    if not info.load.images_in_flight and not info.load.images_queued:
                        return
                await asyncio.sleep(0.1)
        self.field.ledger.violation(f"the server was not at rest {CALM_S:g} s after an attack")

    async def _at_rest(self) -> Reading:
        """A reading that does not get lower by waiting: connections end in their own time."""
        best = await self.field.server.read()
        for _ in range(10):
            await asyncio.sleep(0.2)
            reading = await self.field.server.read()
            if _size(reading) >= _size(best):
                return best
            best = reading
        return best


def _size(reading: Reading) -> tuple[int, int]:
    return reading.descriptors + reading.tasks, reading.heap_bytes
