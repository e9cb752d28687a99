"""A real PostgreSQL server for tests: from Debian's package, on a Unix socket, in a folder."""

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

_BINARIES = "/usr/lib/postgresql"
# The server refuses to run as root.
_OTHER_USERS = ("postgres", "nobody")
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "shared_buffers": "4MB",
    "max_connections": "40",
    "autovacuum": "off",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresServer:
    """A running server. `restart` ends all connections to it."""

    binaries: Path
    folder: Path
    user: str | None

    def url(self, schema: str = "public") -> str:
        """The URL of a schema of its one database."""
        host, options = quote(str(self.folder), safe=""), quote(f"-csearch_path={schema}", safe="")
        return f"postgresql://oneword@/postgres?host={host}&options={options}"

    @contextmanager
    def schema(self) -> Generator[str]:
        """The URL of a new schema, for one test."""
        import psycopg

        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
            yield self.url(name)
            connection.close()  # the server may have been started again meanwhile
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA {name} CASCADE".encode())

    def start(self) -> None:
        settings = {**_SETTINGS, "unix_socket_directories": str(self.folder)}
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        self._control("start", "-w", "-l", str(self.folder / "log"), "-o", options)

    def stop(self) -> None:
        self._control("stop", "-w", "-m", "immediate")

    def run(self, *command: str) -> None:
        # With `user=`, subprocess forks, and a fork in a process that has gRPC's threads may abort
        # in gRPC's own handlers; without it the child never runs them (vfork).
        as_user = (
            ["setpriv", f"--reuid={self.user}", f"--regid={_group(self.user)}", "--clear-groups"]
            if self.user
            else []
        )
        subprocess.run(
            [*as_user, str(self.binaries / command[0]), *command[1:]],
            check=True,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def _control(self, *arguments: str) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), *arguments)


@contextmanager
def running_server() -> Generator[PostgresServer]:
    """Make a database and serve it until the end; skips the test where there is no PostgreSQL."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (oneword[postgres])")
    # The socket's path may have 107 bytes: pytest's own folders can be longer.
    folder = Path(tempfile.mkdtemp(prefix="oneword-pg-", dir="/tmp"))
    try:
        server = PostgresServer(binaries=_binaries(), folder=folder, user=_user())
        if server.user:
            shutil.chown(folder, server.user)
        # A language whose order is not that of code points, so that a missing COLLATE shows.
        language = ["--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US"]
        server.run(
            *("initdb", "-D", str(folder / "data"), "-U", "oneword", "-A", "trust"),
            *("-E", "UTF8", "--no-sync", *language),
        )
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _binaries() -> Path:
    found = sorted(Path(_BINARIES).glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found or int(found[-1].parts[-3]) < 15:
        pytest.skip("PostgreSQL 15 or later is not installed (Debian's package postgresql)")
    return found[-1].parent


def _user() -> str | None:
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(user for user in _OTHER_USERS if user in known)


def _group(user: str) -> int:
    return pwd.getpwnam(user).pw_gid
