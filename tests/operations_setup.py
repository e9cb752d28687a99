"""What tests of logs, metrics and traces share."""

import asyncio

from tests.fakes import WAIT_S
from tests.service_harness import Harness


async def ended(served: Harness) -> None:
    """Return when all calls are over for the server too: a client may know it before."""
    async with asyncio.timeout(WAIT_S):
        while served.server.operations.calls_in_flight:
            await asyncio.sleep(0.001)
