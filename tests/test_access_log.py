"""The log of a server: a line for each call, that says whose it was and not what was in it."""

import contextvars
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.operations.calls import Call, host_of, request_id_of, set_current_call
from engine.operations.config import OperationsConfig
from engine.operations.logs import CallFilter, CallFormatter, JsonFormatter, configure_logging
from engine.security.callers import Caller, Scope, set_current_caller
from protos.oneword.v1.generation_pb2 import GenerateRequest
from tests import service_harness
from tests.fakes import WAIT_S
from tests.operations_setup import ended
from tests.service_harness import Harness, StartServer, details, first_response

start_server, served = service_harness.start_server, service_harness.served

GENERATE = "/oneword.v1.ImageGenerationService/Generate"
SECRET = "marmalade"
FORGED = 'x"}\n{"level": "ERROR"}\x1b[2J\u202e'


class Log:
    """What the log of a server in this process would be, in one of the two formats."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.addFilter(CallFilter())
        self.handler.setFormatter(formatter)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def of_calls(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["logger"] == "engine.access"]


@pytest.fixture
def logs() -> Iterator[dict[str, Log]]:
    found = {
        "json": Log(JsonFormatter()),
        "text": Log(CallFormatter("%(asctime)s %(levelname)s %(message)s")),
    }
    root, engine = logging.getLogger(), logging.getLogger("engine")
    level = engine.level
    engine.setLevel(logging.INFO)
    for log in found.values():
        root.addHandler(log.handler)
    yield found
    for log in found.values():
        root.removeHandler(log.handler)
    engine.setLevel(level)


async def ask(served: Harness, *metadata: tuple[str, str], **fields: Any) -> str:
    """Generate; returns the id that the answer's headers tell."""
    request = GenerateRequest(num_inference_steps=2, **fields)
    call = served.generation.Generate(request, timeout=WAIT_S, metadata=metadata)
    async for _ in call:
        pass
    headers: Any = await call.initial_metadata()
    return dict(headers)["x-request-id"]


async def test_each_call_has_a_line(served: Harness, logs: dict[str, Log]) -> None:
    told = await ask(served, ("x-request-id", "their-id.1"), prompt=f"a {SECRET}")
    assert told == "their-id.1"
    made = await ask(served, prompt="a cat")
    refused = await served.refusal(prompt=f"a <{SECRET}>")
    await ended(served)
    ok, other, failed = logs["json"].of_calls()
    assert (
        ok.items()
        >= {
            "level": "INFO",
            "request_id": "their-id.1",
            "tenant": "default",
            "method": GENERATE,
            "code": "OK",
            "reason": "",
            "peer": "127.0.0.1",
        }.items()
    )
    assert ok["duration_ms"] > 0.0
    assert other["request_id"] == made and len(made) == 32
    assert (failed["code"], failed["reason"]) == ("NOT_FOUND", "UNKNOWN_CONCEPT")
    # The id in the details of the error is the one in the log.
    assert details(refused)["google.rpc.RequestInfo"].request_id == failed["request_id"]
    text = [line for line in logs["text"].lines if GENERATE in line]
    assert len(text) == 3 and "tenant=default" in text[0] and "request_id=their-id.1" in text[0]
    assert SECRET not in logs["json"].stream.getvalue() + logs["text"].stream.getvalue()


async def test_a_cancelled_call_has_a_line(served: Harness, logs: dict[str, Log]) -> None:
    served.denoiser.gate.clear()
    call = served.generation.Generate(GenerateRequest(prompt="a"), timeout=WAIT_S)
    await first_response(call)
    call.cancel()
    await ended(served)
    (entry,) = logs["json"].of_calls()
    assert entry["code"] == "CANCELLED"


async def test_what_is_logged_in_a_call_says_whose_it_is(
    served: Harness, logs: dict[str, Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_arguments: Any, **_settings: Any) -> None:
        # In a thread of the pool, where the planning is done.
        logging.getLogger("engine.planning").warning("about to break")
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(served.server._runtime.pipeline, "plan", break_down)
    error = await served.refusal(prompt="a cat")
    assert error.code() == StatusCode.INTERNAL
    await ended(served)
    entries = logs["json"].entries
    request_id = details(error)["google.rpc.RequestInfo"].request_id
    assert len(entries) == 3
    assert {entry["request_id"] for entry in entries} == {request_id}
    assert {entry["method"] for entry in entries} == {GENERATE}
    (line,) = [line for line in logs["text"].lines if "about to break" in line]
    assert line.endswith(f"[request_id={request_id} tenant=default method={GENERATE}]")


async def test_health_checks_and_no_access_log_are_quiet(
    start_server: StartServer, logs: dict[str, Log]
) -> None:
    served = await start_server()
    stub: Any = health_pb2_grpc.HealthStub(served.channel)  # pyright: ignore[reportArgumentType]
    await stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    assert logs["json"].of_calls() == []
    silent = await start_server(operations=OperationsConfig(access_log=False))
    await silent.generate(prompt="a cat")
    await ended(served)
    await ended(silent)
    assert logs["json"].of_calls() == []


async def test_nobody_forges_a_line(served: Harness, logs: dict[str, Log]) -> None:
    await served.refusal(prompt="a", sampler=FORGED)
    call: Any = served.channel.unary_unary("/a%0aERROR/\u00e9")
    with pytest.raises(Exception, match="."):
        await call(b"", timeout=WAIT_S)
    await ended(served)
    logging.getLogger("engine.test").warning("a name: %s", FORGED)
    for entry in logs["json"].entries:
        assert "time" in entry
    for line in (*logs["json"].lines, *logs["text"].lines):
        assert line.isprintable(), line
    assert not any(line.startswith("ERROR") for line in logs["text"].lines)


def test_a_traceback_is_one_line_of_json(logs: dict[str, Log]) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("engine.test").exception("it broke")
    (entry,) = logs["json"].entries
    assert entry["message"] == "it broke" and "ValueError" in entry["exception"]
    assert "request_id" not in entry


@pytest.mark.parametrize("value", ["a", "A-1_b:c.d", "x" * 128])
def test_a_sane_id_is_taken(value: str) -> None:
    assert request_id_of([("other", "y"), ("x-request-id", value)]) == value


@pytest.mark.parametrize("value", ["", "a b", "-a", "x" * 129, "a\n", "a;b", "é", "../a"])
def test_another_id_is_replaced(value: str) -> None:
    made = request_id_of([("x-request-id", value)])
    assert made != value and len(made) == 32


def test_two_ids_are_none() -> None:
    assert len(request_id_of([("x-request-id", "a"), ("x-request-id", "b")])) == 32


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:41122", "10.0.0.7"),
        ("ipv6:%5B::1%5D:41122", "::1"),
        ("ipv6:[2001:db8::1]:41122", "2001:db8::1"),
        ("unix:", "unix"),
        ("unix:/run/secret/socket", "unix"),
    ],
)
def test_a_peer_is_named_without_its_port(peer: str, host: str) -> None:
    assert host_of(peer) == host


def test_the_format_is_the_one_asked_for() -> None:
    stream, root = io.StringIO(), logging.getLogger()
    before = list(root.handlers)
    try:
        handler = configure_logging("json", stream)
        assert configure_logging("json", stream) is not handler
        logging.getLogger("engine.test").error("hello")
    finally:
        root.handlers[:] = before
    (line,) = stream.getvalue().splitlines()  # once, though it was configured twice
    assert json.loads(line)["message"] == "hello"


def test_a_caller_is_named_by_its_tenant() -> None:
    def caller() -> str:
        set_current_caller(Caller(tenant="acme", name="ci", scopes=frozenset({Scope.GENERATE})))
        record = logging.LogRecord("engine", logging.INFO, "", 0, "hi", (), None)
        set_current_call(Call(request_id="1", method="/a/B"))
        CallFilter().filter(record)
        return JsonFormatter().format(record)

    entry = json.loads(contextvars.copy_context().run(caller))
    assert (entry["tenant"], entry["request_id"], entry["method"]) == ("acme", "1", "/a/B")
