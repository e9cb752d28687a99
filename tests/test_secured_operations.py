"""What operators see of calls that need credentials: whose they are, and who was refused."""

import json
from typing import Any

from grpc import StatusCode

from tests import security_setup, test_access_log
from tests.operations_setup import ended
from tests.security_setup import Secured, sound_requests
from tests.test_access_log import Log

start_secured, secured = security_setup.start_secured, security_setup.secured
logs = test_access_log.logs

GENERATE = "/oneword.v1.ImageGenerationService/Generate"


async def test_a_line_names_the_tenant_and_refusals_are_no_flood(
    secured: Secured, logs: dict[str, Log]
) -> None:
    known = await secured.known("acme", ["generate"])
    await known.call(GENERATE, *sound_requests(GENERATE))
    denied = await known.refusal("/oneword.v1.ConceptService/ListConcepts")
    stranger = secured.caller("ow_nothing")
    refused = await stranger.refusal(GENERATE, *sound_requests(GENERATE))
    served: Any = secured  # it has a server too
    await ended(served)
    assert denied.code() == StatusCode.PERMISSION_DENIED
    assert refused.code() == StatusCode.UNAUTHENTICATED
    assert dict(refused.initial_metadata())["x-request-id"]
    ok, second = logs["json"].of_calls()
    assert (ok["tenant"], ok["code"]) == ("acme", "OK")
    assert second["reason"] == "PERMISSION_DENIED"
    counted = secured.server.operations.metrics.rpcs.read()
    assert counted[GENERATE, "UNAUTHENTICATED"] == 1.0
    assert "ow_" not in json.dumps(logs["json"].entries)
