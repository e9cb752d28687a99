"""Servers in processes of their own, started as the command starts them, or with a probe inside."""

import json
import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks.peers import ROOT
from engine.config_text import to_toml
from engine.serving.server_config import ServerConfig
from protos.oneword.v1.concepts_pb2_grpc import ConceptServiceStub
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub
from protos.oneword.v1.server_info_pb2_grpc import ServerInfoServiceStub

STOP_S = 60.0
COMMAND = ("-m", "oneword", "serve", "--config")
PROBED = ("-m", "benchmarks.serving.probed_server")


@dataclass(kw_only=True)
class RunningServer:
    """A server, a channel to it, and its log."""

    process: "subprocess.Popen[str]"
    address: str
    log: Path
    channel: grpc.Channel

    def __post_init__(self) -> None:
        # The stubs of grpc.aio and of grpc are one type to the generated code.
        channel: Any = self.channel
        self.generation: Any = ImageGenerationServiceStub(channel)
        self.concepts: Any = ConceptServiceStub(channel)
        self.info: Any = ServerInfoServiceStub(channel)

    def ask(self, word: str) -> Any:
        """What a probed server answers to a word (benchmarks/serving/probed_server.py)."""
        assert self.process.stdin and self.process.stdout
        print(word, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@contextmanager
def running_server(
    folder: Path,
    *,
    name: str = "server",
    probed: bool = False,
    environment: Mapping[str, str] | None = None,
    **settings: Any,
) -> Generator[RunningServer]:
    """A server with these settings of `ServerConfig`, until the block ends; `folder` keeps its
    configuration and its log (`NAME.log`)."""
    config = ServerConfig(listen="127.0.0.1:0", **settings)
    path, log = folder / f"{name}.toml", folder / f"{name}.log"
    path.write_text(to_toml(config))
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, *(PROBED if probed else COMMAND), str(path)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            address = line.split()[-1]
            with grpc.insecure_channel(address) as channel:
                yield RunningServer(process=process, address=address, log=log, channel=channel)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
