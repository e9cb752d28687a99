"""Bundles put in service by name over a real gRPC server, while requests run."""

import asyncio
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from engine.bundle import MANIFEST
from engine.client import AsyncClient, ServerError
from engine.errors import ConfigError, NumericalError
from engine.security.bundle_signatures import sign_bundle
from engine.security.config import SecurityConfig, is_exposed
from engine.security.credential_edits import create_token
from engine.security.signing import create_keys, read_private_key
from engine.serving.serve import serve
from engine.serving.server import Server
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import ConceptStore
from engine.training.config import TrainingConfig
from engine.worker.remote_model import open_remote
from protos.oneword.v1 import admin_pb2
from tests import admin_setup, security_setup
from tests.admin_setup import Administered, StartAdmin, make_bundle, refusal
from tests.security_setup import Secured
from tests.service_harness import details, field_of
from tests.worker_harness import WAIT_S, altered_bundle

# Fixtures.
start_admin = admin_setup.start_admin
start_secured, secured = security_setup.start_secured, security_setup.secured

ADMIN = "/oneword.v1.AdminService/"


@pytest.fixture
async def served(start_admin: StartAdmin) -> Administered:
    return await start_admin()


# Listing


async def test_bundles_are_listed_with_what_they_are(served: Administered, tmp_path: Path) -> None:
    (served.folder / "broken").mkdir()
    (served.folder / "broken" / MANIFEST).write_text("{}")
    (served.folder / "empty").mkdir()
    (served.folder / ".hidden").mkdir()
    (served.folder / "a\nb").mkdir()
    (served.folder / "file").write_text("")
    (served.folder / "circle").symlink_to("circle")
    make_bundle(tmp_path / "elsewhere")
    (served.folder / "out").symlink_to(tmp_path / "elsewhere")
    (served.folder / "current").symlink_to("second")
    found = {bundle.bundle_name: bundle for bundle in await served.bundles()}
    assert list(found) == ["broken", "current", "empty", "first", "out", "second"]
    assert [name for name, bundle in found.items() if bundle.in_service] == ["first"]
    assert found["second"].model_name == found["current"].model_name == "second"
    assert found["second"].build_key == "key of second"
    assert len(found["second"].embedding_fingerprint) == 64
    assert found["first"].problem == found["second"].problem == ""
    assert "format_version" in found["broken"].problem
    assert "bundle.json is missing" in found["empty"].problem
    assert "leads out of bundle_dir" in found["out"].problem
    assert found["out"].model_name == ""
    for bundle in found.values():
        assert str(tmp_path) not in bundle.problem and "\n" not in bundle.problem


async def test_bundles_come_in_pages(served: Administered) -> None:
    for name in ("a", "b", "c"):
        make_bundle(served.folder / name)
    names: list[str] = []
    request = admin_pb2.ListBundlesRequest(page_size=2)
    while True:
        page = await served.admin.ListBundles(request)
        names += [bundle.bundle_name for bundle in page.bundles]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert names == ["a", "b", "c", "first", "second"]
    for fields in ({"page_size": -1}, {"page_token": "!"}):
        error = await refusal(served.bundles(**fields))
        assert error.code() == StatusCode.INVALID_ARGUMENT


async def test_a_bundle_that_was_built_anew_is_not_the_one_in_service(served: Administered) -> None:
    assert not (await served.deploy("first")).changed
    make_bundle(served.folder / "first", build_key="new")
    assert not any(bundle.in_service for bundle in await served.bundles())
    reply = await served.deploy("first")
    assert (reply.changed, reply.deployment.build_key) == (True, "new")
    assert served.loading.loaded == ["first"]


# Deploying


async def test_a_bundle_takes_over_while_requests_run(served: Administered) -> None:
    before = await served.deployment()
    drawn: list[str] = []
    stop = asyncio.Event()

    async def draw() -> None:
        while not stop.is_set():
            drawn.append(await served.drawn_by())

    async with asyncio.TaskGroup() as group:
        group.create_task(draw())
        reply = await served.deploy("second")
        assert await served.drawn_by() == "second"  # from the moment that it returns
        stop.set()
    assert set(drawn) <= {"first", "second"}
    assert (reply.changed, reply.deployment.bundle_name) == (True, "second")
    assert (before.bundle_name, before.model_name) == ("first", "first")
    await served.retired()
    after = await served.deployment()
    assert (after.bundle_name, after.model_name, after.retiring) == ("second", "second", False)
    assert after.start_time.ToDatetime() > before.start_time.ToDatetime()
    assert not after.loading_bundle_name and not after.HasField("loading_start_time")
    assert not (await served.deploy("second")).changed
    assert served.loading.loaded == ["second"]


async def test_a_path_is_no_name(served: Administered) -> None:
    paths = ("", ".", "..", "../first", "first/", "first/..", str(served.folder / "first"), "a/b")
    for name in (*paths, "a\\b", ".hidden", "a\0b", "a\nb", "\u00e9" * 128):
        error = await refusal(served.deploy(name))
        assert error.code() == StatusCode.INVALID_ARGUMENT, name
        assert field_of(error) == "bundle_name"
        assert "not the name of a bundle" in (error.details() or "")


async def test_a_link_that_leads_out_is_refused_and_one_inside_is_not(
    served: Administered, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "elsewhere")
    for name, target in (
        ("out", tmp_path / "elsewhere"),
        ("up", ".."),
        ("self", "."),
        ("gone", tmp_path / "nothing"),
    ):
        (served.folder / name).symlink_to(target)
        error = await refusal(served.deploy(name))
        assert (error.code(), field_of(error)) == (StatusCode.INVALID_ARGUMENT, "bundle_name")
        assert str(tmp_path) not in (error.details() or "")
    (served.folder / "circle").symlink_to("circle")
    assert (await refusal(served.deploy("circle"))).code() == StatusCode.NOT_FOUND
    (served.folder / "current").symlink_to("second")
    reply = await served.deploy("current")
    assert reply.deployment.bundle_name == "second"


async def test_an_unknown_name_is_not_found(served: Administered) -> None:
    (served.folder / "file").write_text("")
    for name in ("third", "file", "x" * 255):
        error = await refusal(served.deploy(name))
        assert error.code() == StatusCode.NOT_FOUND
        assert "there: first, second" in (error.details() or "")
        assert details(error)["google.rpc.ResourceInfo"].resource_name == name


async def test_what_cannot_be_loaded_leaves_the_old_one_serving(
    served: Administered, caplog: pytest.LogCaptureFixture
) -> None:
    (served.folder / "empty").mkdir()
    error = await refusal(served.deploy("empty"))
    assert error.code() == StatusCode.FAILED_PRECONDITION
    assert "first goes on serving: no bundle at empty" in (error.details() or "")
    assert str(served.folder) not in (error.details() or "")
    served.loading.error = NumericalError("NaN")
    assert (await refusal(served.deploy("second"))).code() == StatusCode.FAILED_PRECONDITION
    assert (await served.deployment()).bundle_name == "first"
    assert await served.drawn_by() == "first"
    served.loading.error = None
    assert (await served.deploy("second")).changed


async def test_another_one_meanwhile_is_refused_and_the_same_is_waited_for(
    served: Administered,
) -> None:
    make_bundle(served.folder / "third")
    served.loading.gate.clear()
    first = asyncio.ensure_future(served.deploy("second"))
    await served.loading.has_begun()
    deployment = await served.deployment()
    assert (deployment.bundle_name, deployment.loading_bundle_name) == ("first", "second")
    assert deployment.HasField("loading_start_time")
    for name in ("third", "first"):
        error = await refusal(served.deploy(name))
        assert error.code() == StatusCode.FAILED_PRECONDITION
        assert details(error)["google.rpc.ErrorInfo"].reason == "DEPLOYMENT_UNDER_WAY"
        assert "'second' is being put in service" in (error.details() or "")
    again = asyncio.ensure_future(served.deploy("second"))
    assert (await served.deployment()).loading_bundle_name == "second"
    served.loading.gate.set()
    assert (await first).changed and (await again).changed
    assert served.loading.loaded == ["second"]


async def test_a_caller_that_goes_away_does_not_stop_it(served: Administered) -> None:
    served.loading.gate.clear()
    call = served.deploy("second")
    await served.loading.has_begun()
    call.cancel()
    assert (await refusal(served.deploy("second", timeout=0.05))).code() == (
        StatusCode.DEADLINE_EXCEEDED
    )
    waiting = asyncio.ensure_future(served.deploy("second"))
    served.loading.gate.set()
    assert (await waiting).deployment.bundle_name == "second"
    assert served.loading.loaded == ["second"]


async def test_a_server_that_stops_tells_those_who_wait(served: Administered) -> None:
    served.loading.gate.clear()
    waiting = asyncio.ensure_future(served.deploy("second"))
    await served.loading.has_begun()
    stopping = asyncio.ensure_future(served.server.stop())
    error = await refusal(waiting)
    assert error.code() == StatusCode.UNAVAILABLE
    assert "is shutting down" in (error.details() or "")
    served.loading.gate.set()
    await stopping


async def test_each_deployment_is_in_the_log(
    served: Administered, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine.serving.admin_service")
    (served.folder / "empty").mkdir()
    await refusal(served.deploy("empty"))
    await served.deploy("second")
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("admin_service")]
    who = "told by 'local' of tenant 'default'"
    assert lines[0] == f"deploying bundle 'empty' in place of 'first', {who}"
    assert lines[1].startswith(f"deploying bundle 'empty', {who}, has failed: ")
    assert lines[2] == f"deploying bundle 'second' in place of 'first', {who}"
    assert lines[3].startswith(f"deployed bundle 'second' in place of 'first', {who}, in ")


# What a server must have


async def test_without_a_folder_of_bundles_the_remedy_is_told(start_admin: StartAdmin) -> None:
    served = await start_admin(bundle_dir=None)
    for call in (served.deploy("second"), served.bundles()):
        error = await refusal(call)
        assert error.code() == StatusCode.FAILED_PRECONDITION
        assert "--bundle-dir FOLDER" in (error.details() or "")
    deployment = await served.deployment()
    assert (deployment.bundle_name, deployment.model_name) == ("", "first")


async def test_a_folder_that_was_removed_is_told_and_the_server_goes_on(
    served: Administered,
) -> None:
    shutil.rmtree(served.folder)
    for call in (served.deploy("second"), served.bundles()):
        error = await refusal(call)
        assert error.code() == StatusCode.FAILED_PRECONDITION
        assert "bundle_dir cannot be read: No such file" in (error.details() or "")
        assert str(served.folder) not in (error.details() or "")
    assert (await served.deployment()).model_name == "first"
    assert await served.drawn_by() == "first"


async def test_a_folder_that_is_none_ends_the_start(tmp_path: Path) -> None:
    config = ServerConfig(bundle=tmp_path, bundle_dir=tmp_path / "none")
    with pytest.raises(ConfigError, match="bundle_dir .*none is not a folder"):
        await serve(config)


async def test_with_trusted_keys_an_unsigned_bundle_is_not_even_read(
    start_admin: StartAdmin, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    create_keys(tmp_path / "key")
    security = SecurityConfig(trusted_keys=(tmp_path / "key.pub",))
    served: Administered = await start_admin(security=security)
    signed = make_bundle(served.folder / "signed")
    sign_bundle(signed, read_private_key(tmp_path / "key"))
    found = {bundle.bundle_name: bundle for bundle in await served.bundles()}
    assert (found["signed"].problem, found["signed"].model_name) == ("", "signed")
    assert "is not signed" in found["second"].problem and found["second"].model_name == ""
    error = await refusal(served.deploy("second"))
    assert error.code() == StatusCode.FAILED_PRECONDITION
    assert "second/bundle.json is not signed" in (error.details() or "")
    assert (await served.deploy("signed")).changed


async def test_a_server_that_learns_takes_no_bundle_of_other_words(
    start_admin: StartAdmin, tmp_path: Path
) -> None:
    training = TrainingConfig(training_model=tmp_path / "model", training_dir=tmp_path / "t")
    served: Administered = await start_admin(training=training)
    make_bundle(served.folder / "other", embedding_fingerprint="f" * 64)
    (other,) = [b for b in await served.bundles() if b.bundle_name == "other"]
    assert "this server learns words for first" in other.problem
    error = await refusal(served.deploy("other"))
    assert error.code() == StatusCode.FAILED_PRECONDITION
    assert "the new bundle has ffffffffffff" in (error.details() or "")
    assert served.loading.loaded == []
    assert (await served.deploy("second")).changed


# Who may


@pytest.mark.parametrize(
    ("listen", "credentials", "exposed"),
    [
        ("127.0.0.1:1", False, False),
        ("[::1]:1", False, False),
        ("localhost:1", False, False),
        ("unix:/x", False, False),
        ("0.0.0.0:1", False, True),
        ("[::]:1", False, True),
        ("example.org:1", False, True),
        ("0.0.0.0:1", True, False),
    ],
)
def test_exposed_is_what_others_reach_unasked(
    listen: str, credentials: bool, exposed: bool
) -> None:
    security = SecurityConfig(credentials=Path("x") if credentials else None)
    assert is_exposed(listen, security) == exposed


async def test_nobody_administers_a_server_that_asks_nobody(start_admin: StartAdmin) -> None:
    served = await start_admin(listen="0.0.0.0:0", insecure=True)
    for call in (served.deploy("second"), served.bundles(), served.deployment()):
        error = await refusal(call)
        assert error.code() == StatusCode.PERMISSION_DENIED
        assert "start it with --credentials" in (error.details() or "")
    assert await served.drawn_by() == "first"
    assert served.loading.loaded == []


async def test_only_the_scope_admin_opens_it(secured: Secured) -> None:
    others = await secured.known(scopes=("generate", "concepts", "train"))
    for method in ("ListBundles", "DeployBundle", "GetDeployment"):
        error = await others.refusal(ADMIN + method)
        assert error.code() == StatusCode.PERMISSION_DENIED
        assert "needs the scope 'admin'" in (error.details() or "")
    operator = await secured.known(scopes=("admin",))
    (reply,) = await operator.call(f"{ADMIN}GetDeployment", admin_pb2.GetDeploymentRequest())
    assert reply.deployment.model_name == "fake"


async def test_the_log_names_the_token_that_deployed(
    start_admin: StartAdmin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine.serving.admin_service")
    file = tmp_path / "credentials.toml"
    new = create_token(file, tenant="acme", name="ops", scopes=["admin"])
    served = await start_admin(security=SecurityConfig(credentials=file))
    metadata = (("authorization", f"Bearer {new.token}"),)
    request = admin_pb2.DeployBundleRequest(bundle_name="second")
    await served.admin.DeployBundle(request, metadata=metadata, timeout=WAIT_S)
    assert "told by 'ops' of tenant 'acme', in " in caplog.text
    assert new.token not in caplog.text


# The clients, and a real bundle


async def test_the_client_deploys(served: Administered) -> None:
    async with AsyncClient(served.address) as client:
        assert [bundle.bundle_name async for bundle in client.admin.bundles()] == [
            "first",
            "second",
        ]
        reply = await client.admin.deploy("second", timeout_s=WAIT_S)
        assert (reply.changed, (await client.admin.deployment()).model_name) == (True, "second")
        served.loading.gate.clear()
        with pytest.raises(ServerError) as caught:
            await client.admin.deploy("first", timeout_s=0.05)
        assert caught.value.code == StatusCode.DEADLINE_EXCEEDED


async def test_a_real_bundle_in_a_process_of_its_own_takes_over_by_name(
    emoji_bundle_path: Path, tmp_path: Path
) -> None:
    altered_bundle(emoji_bundle_path, tmp_path / "other", "other")
    config = ServerConfig(bundle=emoji_bundle_path, bundle_dir=tmp_path, listen="127.0.0.1:0")
    planner, model = open_remote(emoji_bundle_path)
    server = Server(planner, ConceptStore.temporary(), config, model=model)
    address = await server.start()
    try:
        async with AsyncClient(address, timeout_s=WAIT_S) as client:
            fields: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1}
            before = await client.generate(**fields)
            reply = await client.admin.deploy("other")
            assert (reply.deployment.bundle_name, reply.changed) == ("other", True)
            after = await client.generate(**fields)
            assert before.images != after.images
            assert after.summary.model_name == "other"
            # A file that is not what the manifest lists is found when it is loaded.
            altered_bundle(emoji_bundle_path, tmp_path / "damaged", "damaged")
            (tmp_path / "damaged" / "samplers.safetensors").write_bytes(b"x")
            await asyncio.to_thread(server.deployment.wait_retired, WAIT_S)
            with pytest.raises(ServerError, match="other goes on serving: .*is corrupted"):
                await client.admin.deploy("damaged")
            assert (await client.admin.deployment()).bundle_name == "other"
    finally:
        await server.stop()
