"""The examples for other programs, run as their readers would: against a real server."""

import asyncio
import io
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc import StatusCode
from PIL import Image

from protos.oneword.v1 import server_info_pb2
from tests import service_harness
from tests.client_setup import ScriptedServer, answer, come_back, draw, draw_until, fail
from tests.service_harness import Harness, StartServer
from tests.test_client_streams import batch

# Fixtures.
start_server = service_harness.start_server

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "clients"
NODE = shutil.which("node")
INFO = answer(server_info_pb2.GetServerInfoResponse())


@pytest.fixture
async def served(start_server: StartServer) -> Harness:
    return await start_server()


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedServer]:
    """A server that is busy once, then breaks off after an image, then goes on."""
    full = fail(StatusCode.RESOURCE_EXHAUSTED, "full", *come_back(0.01))
    broken = draw_until(4, fail(StatusCode.UNAVAILABLE))
    server = ScriptedServer(
        {"Generate": [full, broken, draw], "GenerateBatch": [batch()], "GetServerInfo": [INFO]}
    )
    yield server
    server.stop()


async def run(
    *command: str | Path, server: str, expect: int = 0, **environ: str
) -> tuple[list[str], str]:
    """Lines of standard output, and standard error, of a program that ends as expected."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ONEWORD_")}
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=ROOT,
        env={**inherited, "ONEWORD_SERVER": server, "PYTHONPATH": str(ROOT), **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == expect, f"{out.decode()}{err.decode()}"
    return out.decode().splitlines(), err.decode()


def size(path: Path) -> tuple[int, int]:
    return Image.open(io.BytesIO(path.read_bytes())).size


async def test_the_blocking_example(served: Harness, tmp_path: Path) -> None:
    words = ["a photo of cat", "--steps", "3", "--output", tmp_path]
    lines, progress = await run(
        sys.executable, EXAMPLES / "python_sync.py", *words, server=served.address
    )
    assert lines[:2] == ["model fake", str(tmp_path / "0.png")]
    assert progress.splitlines() == [f"step {step} of 3" for step in (1, 2, 3)]
    assert size(tmp_path / "0.png") == (64, 64)


async def test_the_blocking_example_draws_what_the_others_of_a_batch_do_not_spoil(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    words = ["a", "b", "c", "--output", tmp_path]
    lines, _ = await run(
        sys.executable, EXAMPLES / "python_sync.py", *words, server=scripted.address
    )
    assert lines[-2:] == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    assert (tmp_path / "2.png").read_bytes() == b"c 2"


async def test_the_asyncio_example(served: Harness, tmp_path: Path) -> None:
    words = ["a photo of cat", "a photo of dog", "--steps", "3", "--output", tmp_path]
    await run(sys.executable, EXAMPLES / "python_async.py", *words, server=served.address)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0.png", "1.png", "first.png"]
    assert {size(path) for path in tmp_path.iterdir()} == {(64, 64)}
    assert await served.is_idle(), "leaving a stream cancels what is left of it"


async def test_the_reflection_example_knows_nothing_and_finds_all(served: Harness) -> None:
    script = EXAMPLES / "reflection.py"
    lines, _ = await run(sys.executable, script, server=served.address)
    assert "oneword.v1.ImageGenerationService" in lines
    assert "  Generate(GenerateRequest) -> stream GenerateResponse" in lines
    assert "grpc.health.v1.Health" in lines
    request = json.dumps({"prompt": "a cat", "seed": "7", "num_inference_steps": 2})
    name = "oneword.v1.ImageGenerationService/Generate"
    lines, _ = await run(sys.executable, script, name, request, server=served.address)
    events = [json.loads(line) for line in lines]
    assert [list(event) for event in events] == [
        ["accepted"], ["progress"], ["progress"], ["image"], ["summary"],
    ]  # fmt: skip
    assert events[0]["accepted"]["seed"] == "7"
    _, error = await run(
        sys.executable, script, name, '{"width": 7}', server=served.address, expect=1
    )
    assert error.startswith("INVALID_ARGUMENT: width must be")
    source = script.read_text()
    assert not any(package in source for package in ("import engine", "from engine", "protos."))


# Node


@pytest.mark.slow
@pytest.mark.skipif(NODE is None, reason="needs node")
@pytest.mark.skipif(
    not (EXAMPLES / "node" / "node_modules").is_dir(),
    reason="needs `npm ci` in examples/clients/node",
)
async def test_the_node_example(served: Harness, scripted: ScriptedServer, tmp_path: Path) -> None:
    assert NODE is not None
    words = [NODE, EXAMPLES / "node" / "generate.js", "a cat", "--seed", str(2**64 - 1)]
    words += ["--images", "2", "--steps", "3", "--out", tmp_path / "x"]
    lines, progress = await run(*words, server=served.address)
    assert lines == [
        str(tmp_path / "x-0.png"),
        str(tmp_path / "x-1.png"),
        f"seeds {2**64 - 1}, 0; ddim",
    ]
    assert size(tmp_path / "x-1.png") == (64, 64)
    assert "image 1: step 3 of 3" in progress
    words = [NODE, EXAMPLES / "node" / "generate.js", "b", "--images", "2", "--out", tmp_path / "y"]
    await run(*words, server=scripted.address)
    calls = scripted.requests("Generate")
    assert len(calls) == 3 and len({call.request_id for call in calls}) == 1
    assert (tmp_path / "y-1.png").read_bytes().startswith(b"b ")
    _, error = await run(*words[:2], "x", server="192.0.2.1:1", expect=1, ONEWORD_TOKEN="secret")
    assert "plain text" in error and "secret" not in error
