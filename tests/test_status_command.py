"""`oneword status` and `oneword top`: against a real server, and on a small terminal."""

import asyncio
import io
import json
import re
from typing import Any

import grpc
import pytest

from engine.client import ServerError
from engine.operations import load_wire
from engine.security.callers import Caller, Scope
from oneword import cli
from oneword.load_display import History, Rates, duration, is_serving, top_lines
from oneword.top import View, as_frame
from protos.oneword.v1 import server_info_pb2
from tests import service_harness
from tests.fakes import WAIT_S
from tests.service_harness import Harness

start_server, served = service_harness.start_server, service_harness.served

Info = server_info_pb2.GetServerInfoResponse


async def oneword(*words: str) -> int:
    return await asyncio.to_thread(cli.main, words)


async def info_of(served: Harness) -> Info:
    return await served.info.GetServerInfo(server_info_pb2.GetServerInfoRequest(), timeout=WAIT_S)


async def test_status_is_one_screen_and_an_exit_code(
    served: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    await served.generate(prompt="a cat", num_images=2)
    await served.refusal(prompt="a", timeout=1e-9)
    assert await oneword("status", "--server", served.address) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith(f"{served.address}: serving, OneWord ")
    assert "fake (fp32), 64 px" in text
    assert re.search(r"^done +2 images; requests: .*1 finished", text, re.MULTILINE)
    assert "serving      oneword.v1.ImageGenerationService" in text
    assert "NOT SERVING  oneword.v1.TrainingService" in text
    assert len(lines) <= 24 and all(line.isprintable() for line in lines)


async def test_status_of_a_server_that_does_not_serve(
    served: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    served.server.operations.health.set_serving("", False)
    assert await oneword("status", "--server", served.address) == 1
    assert f"{served.address}: NOT SERVING" in capsys.readouterr().out
    assert await oneword("status", "--server", "127.0.0.1:1") == 1
    assert "no server at 127.0.0.1:1" in capsys.readouterr().err


async def test_status_as_json_has_all_that_was_counted(
    served: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    await served.generate(prompt="a cat", num_images=2, guidance_scale=2.0)
    assert await oneword("status", "--json", "--server", served.address) == 0
    told = json.loads(capsys.readouterr().out)
    totals = told["load"]["totals"]
    assert told["serving"][""] is True
    assert (totals["images"], totals["requests"]) == ("2", {"finished": "1"})
    assert int(totals["steps"]) == served.denoiser.num_calls
    assert int(totals["stepRows"]) == 2 * 4 * 2
    assert set(totals["stageS"]) == {"encode", "denoise", "decode"}
    assert totals["shed"] == {}
    assert told["load"]["uptimeS"] > 0.0 and int(told["load"]["residentBytes"]) > 1 << 20


async def test_top_once_is_text_for_scripts(
    served: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("top", "--once", "--interval-s", "0", "--server", served.address)
    assert await oneword(*words) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"oneword top  {served.address}  fake  serving")
    assert re.search(r"^images/s +0 ", text, re.MULTILINE)
    assert all(line.isprintable() for line in text.splitlines())


async def test_rates_are_what_was_done_between_two_answers(served: Harness) -> None:
    await served.generate(prompt="a cat")
    before = (await info_of(served)).load
    await served.generate(prompt="a cat", num_images=2, guidance_scale=2.0)
    after = (await info_of(served)).load
    rates = Rates.between(before, after)
    assert rates.images_per_s == pytest.approx(2 / rates.seconds)
    assert rates.mean_rows is not None and 2.0 <= rates.mean_rows <= 4.0
    assert rates.steps_per_s is not None
    steps = after.totals.steps - before.totals.steps
    assert rates.steps_per_s * rates.seconds == pytest.approx(steps)
    assert rates.mean_rows * steps == pytest.approx(2 * 4 * 2)
    # A server that was started again counts from zero: no negative rates.
    assert Rates.between(after, before) == Rates(seconds=0.0)


async def test_top_waits_for_a_server_that_goes_away(served: Harness) -> None:
    info = await info_of(served)
    answers: list[Info | None] = [info, None, info]

    def ask() -> Info:
        answer = answers.pop(0)
        if answer is None:
            raise ServerError(grpc.StatusCode.UNAVAILABLE, "no server at \x1b[2J")
        return answer

    view = View("host:1")
    first, gone, back = view.frame(ask), view.frame(ask), view.frame(ask)
    assert gone[2] == "no server at \\x1b[2J"
    assert first == back


def test_a_frame_fits_the_terminal() -> None:
    info = Info(
        load=server_info_pb2.Load(
            tenants=[server_info_pb2.TenantLoad(tenant=f"t{n}" * 99) for n in range(20)],
            totals=server_info_pb2.Totals(shed={f"reason{n}": n for n in range(50)}),
        ),
        serving={"": False, "a": False},
    )
    history = History()
    for value in range(100):
        history.add(float(value))
    lines = top_lines(info, "h:1", Rates(seconds=0.0), history)
    frame = as_frame(lines, 80, 24)
    text = frame.replace("\x1b[H", "").replace("\x1b[K", "").replace("\x1b[J", "")
    assert len(text.split("\r\n")) <= 24
    assert all(len(line) <= 80 and line.isprintable() for line in text.split("\r\n"))
    assert "NOT SERVING" in lines[0] and not is_serving(info)
    assert len(history.bars()) == history.most


def test_a_plain_terminal_gets_plain_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert History(values=[0.0, 1.0, 2.0]).bars() == "_=#"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0 min 0 s"), (61.0, "1 min 1 s"), (7260.0, "2 h 1 min"), (90_000.0, "1 d 1 h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_only_admins_see_whose_load_it_is(served: Harness, monkeypatch: Any) -> None:
    served.denoiser.gate.clear()
    call = served.generation.Generate(
        service_harness.GenerateRequest(prompt="a cat"), timeout=WAIT_S
    )
    await service_harness.first_response(call)
    assert [tenant.tenant for tenant in (await info_of(served)).load.tenants] == ["default"]
    stranger = Caller(tenant="t", name="n", scopes=frozenset({Scope.GENERATE}))
    monkeypatch.setattr(load_wire, "current_caller", lambda: stranger)
    load = (await info_of(served)).load
    assert list(load.tenants) == [] and load.requests_running == 1
    call.cancel()
