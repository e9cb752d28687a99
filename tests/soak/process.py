"""The server under attack: what it is started with, and how it is watched and stopped."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from engine.security.credential_edits import create_token
from tests.security_setup import ALL, Pems
from tests.soak import gauges
from tests.soak.gauges import Reading

ROOT = Path(__file__).resolve().parent.parent.parent
RESIDENTS = ("acme", "globex")
INTRUDER = "mallory"
START_S = 120.0
# Small enough that attacks reach the limits.
_CONFIG = """
listen = "127.0.0.1:0"
grace_s = 20.0
stall_timeout_s = 2.0

[worker]
worker_timeout_s = 4.0

[jobs]
max_open_jobs = 20

[batcher]
max_queued_images = 48
cost_measurement_s = 0.5

[limits]
max_pixels = 16384
"""
_QUOTAS = """
[tenants.mallory]
requests_per_second = 2000.0
burst = 4000
concurrent_rpcs = 96

[defaults]
requests_per_second = 1000.0
burst = 1000
concurrent_rpcs = 64

"""
# What malloc has given out is what lives: Python's objects are in it, and what each thread keeps
# for its next calls (megabytes with two dozen threads, and more in every minute) is not.
HEAP_TELLS = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder with all that a server needs, but for the bundle."""

    folder: Path
    bundle: Path
    authority: Path  # PEM
    tokens: dict[str, str]  # by tenant

    @classmethod
    def make(cls, folder: Path, bundle: Path) -> "Place":
        authority = trustme.CA()
        pems = Pems.write(folder / "tls", authority, authority.issue_cert("localhost"))
        credentials = folder / "credentials.toml"
        credentials.touch(0o600)
        credentials.write_text(_QUOTAS)
        tokens = {
            tenant: create_token(credentials, tenant=tenant, name="soak", scopes=ALL).token
            for tenant in (*RESIDENTS, INTRUDER)
        }
        (folder / "server.toml").write_text(_CONFIG)
        return cls(folder=folder, bundle=bundle, authority=pems.ca, tokens=tokens)

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def command(self) -> list[str]:
        folder = self.folder
        return [
            sys.executable, "-m", "tests.soak.served", "serve",
            "--config", str(folder / "server.toml"),
            "--bundle", str(self.bundle), "--concept-dir", str(folder / "concepts"),
            "--job-dir", str(folder / "jobs"), "--credentials", str(folder / "credentials.toml"),
            "--tls-cert", str(folder / "tls/cert.pem"), "--tls-key", str(folder / "tls/key.pem"),
        ]  # fmt: skip


class ServerProcess:
    """A server of its own, from its start to its end."""

    def __init__(self, place: Place, *, began: float | None = None) -> None:
        self.place = place
        self._began = time.monotonic() if began is None else began
        with place.log.open("ab") as log:
            self._process = subprocess.Popen(
                place.command(),
                cwd=ROOT,
                env={**os.environ, **HEAP_TELLS, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        line = self._line()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the server did not start; see {place.log}")
        # Certificates are for names.
        self.address = line.removeprefix("listening on ").strip()
        self.target = f"localhost:{self.address.rpartition(':')[2]}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def worker_pid(self) -> int | None:
        """The process that has the model, where there is one now."""
        found = gauges.children(self.pid) if self.alive else []
        return found[0] if found else None

    async def read(self) -> Reading:
        """What it takes up now."""
        inside: dict[str, Any] = json.loads(await asyncio.to_thread(self._ask))
        worker = self.worker_pid or 0
        return Reading(
            at_s=time.monotonic() - self._began,
            resident_bytes=gauges.resident_bytes(self.pid),
            descriptors=gauges.num_descriptors(self.pid),
            threads=gauges.num_threads(self.pid),
            worker_pid=worker,
            worker_resident_bytes=gauges.resident_bytes(worker) if worker else 0,
            **inside,
        )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop; returns its exit code."""
        self._process.send_signal(number)
        try:
            return self._process.wait(60.0)
        finally:
            self.close()

    def close(self) -> None:
        if self.alive:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _ask(self) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(b"?")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode()
