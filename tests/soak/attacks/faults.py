"""What happens to machines: the model's process is killed, or stops, under load."""

import asyncio
import os
import random
import signal
import time
from contextlib import suppress

from grpc_health.v1 import health_pb2

from tests.soak.attacks.registry import attack
from tests.soak.field import GENERATE, HEALTH, Field

BACK_S = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING


async def until_serving(field: Field, who: str, within_s: float = BACK_S) -> bool:
    """Wait until health says SERVING; a server that never does has violated its promise."""
    ends = time.monotonic() + within_s
    async with field.caller(None) as caller:
        while time.monotonic() < ends:
            request = health_pb2.HealthCheckRequest()
            replies = await field.attempt(caller, "probe", f"{HEALTH}Check", request)
            if replies and replies[0].status == SERVING:
                return True
            await asyncio.sleep(0.1)
    field.ledger.violation(f"health was not SERVING within {within_s:g} s after {who}")
    return False


async def _another(field: Field, than: int) -> None:
    """Wait until another process has the model."""
    ends = time.monotonic() + BACK_S
    while time.monotonic() < ends:
        if field.server.worker_pid not in (None, than):
            return
        await asyncio.sleep(0.05)


@attack(16)
async def killed_worker(field: Field, chance: random.Random) -> None:
    """SIGKILL, as the kernel does where memory runs out."""
    pid = field.server.worker_pid
    if pid is None:
        return
    with field.ledger.fault():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        await _another(field, pid)
        await until_serving(field, "a killed worker")


@attack(16)
async def stopped_worker(field: Field, chance: random.Random) -> None:
    """SIGSTOP: for a moment, or until the server takes it for hung."""
    pid = field.server.worker_pid
    if pid is None:
        return
    with field.ledger.fault(), suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(chance.choice([0.3, 1.0]))
        os.kill(pid, signal.SIGCONT)
        await until_serving(field, "a worker that was stopped")


@attack(16)
async def hung_worker(field: Field, chance: random.Random) -> None:
    """SIGSTOP for good: the call that waits must end, and another process take over."""
    pid = field.server.worker_pid
    if pid is None:
        return
    with field.ledger.fault():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        async with field.caller(field.intruder.name) as caller:  # somebody must ask for it
            await field.attempt(caller, field.intruder.name, GENERATE, field.draw(), timeout=BACK_S)
        await _another(field, pid)
        await until_serving(field, "a hung worker")
