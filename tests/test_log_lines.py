"""Logs that keep prompts and secrets to themselves, and that no caller can forge."""

import io
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from grpc import StatusCode

from engine.faults import describe_fault
from engine.operations.log_lines import LineFormatter
from engine.operations.logs import configure_logging
from tests import security_setup, service_harness
from tests.security_setup import Secured
from tests.service_harness import Harness, details, kinds, make_concept
from tests.soak.http2 import DATA, END_STREAM, connected, frame, message, opened

# Fixtures.
start_server, served = service_harness.start_server, service_harness.served
start_secured, secured = security_setup.start_secured, security_setup.secured

SECRET = "xyzzy marmalade"
FORGED = "<a\n2026-01-01 00:00:00,000 ERROR forged\x1b[2J\u202e>"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that a server in this process would write to its log, at the level that it has."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    root, engine = logging.getLogger(), logging.getLogger("engine")
    before = root.level, engine.level
    root.addHandler(handler)
    engine.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    engine.setLevel(before[1])


# Callers' text


async def test_nothing_that_a_caller_writes_is_in_the_log(
    served: Harness, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    await served.generate(prompt=f"a {SECRET} cat", negative_prompt=SECRET)
    await served.refusal(prompt=f"a <{SECRET.split()[0]}>")
    await served.refusal(prompt=SECRET, sampler=SECRET)

    def break_down(*_arguments: Any, **_settings: Any) -> None:
        raise RuntimeError(f"cannot tokenize {SECRET!r}") from ValueError(SECRET)

    monkeypatch.setattr(served.server._runtime.pipeline, "plan", break_down)
    error = await served.refusal(prompt=SECRET)
    assert error.code() == StatusCode.INTERNAL
    request_id = details(error)["google.rpc.RequestInfo"].request_id
    text = log.getvalue()
    assert not any(word in text for word in SECRET.split())
    assert re.search(rf"request {request_id} failed: RuntimeError at .*break_down", text)


async def test_what_went_wrong_is_in_the_log_at_debug(
    served: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    served.denoiser.error = RuntimeError("of the device")
    with caplog.at_level(logging.DEBUG, logger="engine"):
        await served.refusal(prompt="a cat")
    assert "of the device" in caplog.text
    served.denoiser.error = None
    assert kinds(await served.generate(prompt="a cat"))[-1] == "summary"


async def test_a_header_that_is_no_text_is_not_logged(served: Harness) -> None:
    """gRPC itself logs the bytes of such a header, a token with a slip among them, with a
    traceback. No client library sends one, so this writes the frames of HTTP/2."""
    stream = io.StringIO()
    handler = configure_logging("text", stream)
    try:
        async with connected(served.address, None) as wire:
            secret = ("authorization", SECRET.encode() + b"\xff")
            await wire.send(opened(1, "/oneword.v1.ServerInfoService/GetServerInfo", secret))
            await wire.send(frame(DATA, END_STREAM, 1, message(b"")))
            await wire.until_end_of(1)
    finally:
        logging.getLogger().removeHandler(handler)
    assert SECRET not in stream.getvalue() and "Traceback" not in stream.getvalue()


async def test_headers_and_hashes_are_not_logged(secured: Secured, log: io.StringIO) -> None:
    token = secured.token()
    await secured.learn_of()
    caller = secured.caller(token)
    info = "/oneword.v1.ServerInfoService/GetServerInfo"
    await caller.call(info, *security_setup.sound_requests(info))
    caller.metadata = (("authorization", f"Bearer {token}x"), ("x-secret", SECRET))
    await caller.refusal(info)
    text = log.getvalue()
    assert "refused" in text
    assert token.split("_")[2] not in text and "marmalade" not in text
    assert secured.credentials.read_text().split('sha256 = "')[1][:64] not in text


# Forged lines


@pytest.mark.parametrize(
    "text",
    [
        FORGED,
        "\r\n2026 ERROR",
        "\x00\x07\x08",
        "\x9b2J",
        "\u2028next",
        "\x85next",
        "\x1b]0;title\x07",
    ],
)
def test_a_record_is_one_line_of_printable_text(log: io.StringIO, text: str) -> None:
    logging.getLogger("engine.test").warning("a name: %s", text)
    (line,) = log.getvalue().split("\n")[:-1]
    assert line.isprintable() and "a name: " in line


def test_an_exception_cannot_look_like_a_record(log: io.StringIO) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("engine.test").exception("it broke")
    first, *rest = log.getvalue().split("\n")[:-1]
    assert first.endswith("ERROR it broke")
    assert rest and all(line.startswith("  | ") and line.isprintable() for line in rest)
    assert not [line for line in rest if re.match(r"\d{4}-", line)]


async def test_a_forged_name_stays_in_its_line(served: Harness, log: io.StringIO) -> None:
    concept = make_concept()
    object.__setattr__(concept, "placeholder_token", FORGED)
    logging.getLogger("engine.training.supervisor").warning(
        "the concept of training %s: %s", "0", f"{concept.placeholder_token} is taken"
    )
    await served.refusal(prompt="a cat", sampler=FORGED)
    assert all(line.isprintable() for line in log.getvalue().split("\n"))
    assert not re.search(r"^2026-01-01 00:00:00", log.getvalue(), re.MULTILINE)


async def test_a_method_name_cannot_forge_a_line(secured: Secured, log: io.StringIO) -> None:
    await secured.caller().refusal("/a%0a2026-01-01 ERROR forged")
    assert "refused '/a" in log.getvalue()
    assert len(log.getvalue().strip().split("\n")) == 1


# Faults


def test_a_fault_tells_kinds_and_places_alone() -> None:
    def inner() -> None:
        raise KeyError(SECRET)

    told = ""
    try:
        try:
            inner()
        except KeyError as error:
            raise RuntimeError(SECRET) from error
    except RuntimeError as error:
        told = describe_fault(error)
    assert "marmalade" not in told
    assert re.match(r"RuntimeError at .*, from KeyError at .*inner", told)


def test_a_ring_of_causes_has_an_end() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert describe_fault(first).count("ValueError") == 8
