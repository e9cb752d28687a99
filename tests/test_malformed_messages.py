"""Bytes that are no message of their method: the caller's mistake, and no bug of the server's."""

import logging
from typing import Any

import pytest
from grpc import StatusCode

from tests import security_setup
from tests.security_setup import METHODS, Secured
from tests.service_harness import details

# Fixtures.
start_secured, secured = security_setup.start_secured, security_setup.secured

TORN = b"\x0a\xff"  # a field of 127 bytes and more, of which none come


class Raw:
    """What a stub takes for a message and sends as it is."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def SerializeToString(self) -> bytes:
        return self._content


@pytest.mark.parametrize("method", METHODS)
async def test_a_torn_message_is_the_callers_to_mend(
    secured: Secured, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    torn: Any = Raw(TORN)
    caller = await secured.known()
    with caplog.at_level(logging.INFO):
        error = await caller.refusal(method, torn)
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert "is not a message of this method" in (error.details() or "")
    assert details(error)["google.rpc.ErrorInfo"].reason == "INVALID_REQUEST"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("method", [one for one in METHODS if not one.startswith("/grpc.health")])
async def test_who_asks_is_asked_first(secured: Secured, method: str) -> None:
    torn: Any = Raw(TORN)
    assert (await secured.caller().refusal(method, torn)).code() == StatusCode.UNAUTHENTICATED
    nobody = await secured.known(scopes=["admin"])
    error = await nobody.refusal(method, torn)
    assert error.code() in (StatusCode.PERMISSION_DENIED, StatusCode.INVALID_ARGUMENT)
