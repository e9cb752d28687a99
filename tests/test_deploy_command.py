"""`oneword deploy` and the versions of `oneword concepts` against a server in this process."""

import asyncio
import re
from pathlib import Path

import pytest

from engine.concepts import concept_to_bytes
from oneword.cli import main
from tests import admin_setup, service_harness
from tests.admin_setup import Administered, StartAdmin, make_bundle
from tests.service_harness import Harness, import_file, make_concept

# Fixtures.
start_admin = admin_setup.start_admin
start_server, served = service_harness.start_server, service_harness.served
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER", "TOKEN", "CA", "TLS"):
        monkeypatch.delenv(f"ONEWORD_{name}", raising=False)


async def run(address: str, *words: str | Path) -> int:
    return await asyncio.to_thread(main, [*map(str, words), "--server", address])


async def test_deploy_lists_and_deploys(start_admin: StartAdmin, capsys: Printed) -> None:
    served: Administered = await start_admin()
    (served.folder / "empty").mkdir()
    assert await run(served.address, "deploy") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.match(r"in service: first \(first\) since \d{4}-\d\d-\d\d ", head)
    assert [line.split()[:2] for line in lines] == [
        ["empty", "-"],
        ["*", "first"],
        ["second", "second"],
    ]
    assert "bundle.json is missing" in lines[0]
    assert await run(served.address, "deploy", "second") == 0
    assert capsys.readouterr().out == "second (second) is in service\n"
    assert await run(served.address, "deploy", "second") == 0
    assert capsys.readouterr().out == "second (second) is in service already\n"


async def test_deploy_fails_in_one_line(start_admin: StartAdmin, capsys: Printed) -> None:
    served: Administered = await start_admin()
    make_bundle(served.folder / "third")
    for name, reason in (("../first", "is not the name of a bundle"), ("none", "unknown bundle")):
        assert await run(served.address, "deploy", name) == 1
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    served.loading.gate.clear()
    assert await run(served.address, "deploy", "third", "--timeout-s", "0.2") == 1
    assert "the server goes on with it" in capsys.readouterr().err
    assert await run(served.address, "deploy") == 0
    assert "> third" in capsys.readouterr().out


async def test_versions_aliases_and_undelete(
    served: Harness, tmp_path: Path, capsys: Printed
) -> None:
    for value in (1.0, 2.0):
        await import_file(served, concept_to_bytes(make_concept(value=value)), overwrite=True)
    name, ids = "<cat-toy>", [make_concept(value=value).concept_id[:12] for value in (1.0, 2.0)]
    assert await run(served.address, "concepts", "alias", name, "stable", "--version", "1") == 0
    assert capsys.readouterr().out == f"{name}@stable is version 1, {ids[0]}\n"
    assert await run(served.address, "concepts", "versions", name) == 0
    second, first = capsys.readouterr().out.splitlines()
    assert second.split()[:2] == ["2", ids[1]]
    assert (first.split()[:2], first.split()[-1]) == (["1", ids[0]], "stable")
    assert await run(served.address, "concepts", "show", f"{name}@stable") == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["version"], shown["aliases"]) == ("1", "stable")
    for words in (
        ("delete", name),
        ("alias", name, "x"),
        ("unalias", name, "stable"),
        ("import", save(tmp_path, 3.0), "--overwrite"),
    ):
        assert await run(served.address, "concepts", *words, "--etag", "of-before") == 1
        assert "has changed since its etag was read" in capsys.readouterr().err
    assert await run(served.address, "concepts", "unalias", name, "stable") == 0
    assert capsys.readouterr().out == f"{name}@stable deleted\n"
    etag = served.store.get(name).etag
    assert await run(served.address, "concepts", "delete", name, "--etag", etag) == 0
    assert capsys.readouterr().out == f"{name} deleted\n"
    assert await run(served.address, "concepts", "undelete", name) == 0
    assert capsys.readouterr().out == f"{name} is back, at version 2\n"
    assert await run(served.address, "concepts", "alias", name, "x", "--version", "-1") == 1
    assert "version must be at least 1" in capsys.readouterr().err


def save(folder: Path, value: float) -> Path:
    path = folder / "concept.safetensors"
    path.write_bytes(concept_to_bytes(make_concept(value=value)))
    return path
