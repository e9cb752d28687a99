"""Signed bundles: one changed byte anywhere, and nothing of them is read."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from build_engines import sign_report
from engine.bundle import MANIFEST, Manifest, read_manifest
from engine.errors import BundleError, ConfigError
from engine.files import sha256_of_file
from engine.pipeline import Pipeline
from engine.plans.manifest import FORMAT_VERSION as PLAN_VERSION
from engine.plans.manifest import PLAN_MANIFEST, PlanManifest, PlanSpec
from engine.security.bundle_signatures import check_bundle, sign_bundle
from engine.security.config import SecurityConfig
from engine.security.signing import create_keys, read_private_key, read_public_key, sign_file
from engine.serving.serve import serve
from engine.serving.server_config import ServerConfig
from oneword.cli import main
from tests.fakes import FakeDenoiser, make_pipeline

pytest.importorskip("cryptography")

GRAPH, PLAN = "denoiser.onnx", "denoiser.plan"
TARGET_FOLDER = "plans/rtx-sm86"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key; its public one has `.pub` behind."""
    folder = tmp_path_factory.mktemp("keys")
    create_keys(folder / "release")
    create_keys(folder / "other")
    return folder / "release"


def public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with the manifests and files of a bundle; no graph in it could be loaded."""
    path = tmp_path / "bundle"
    plans = path / TARGET_FOLDER
    plans.mkdir(parents=True)
    (path / GRAPH).write_bytes(b"a graph" * 100)
    (path / "parity.json").write_text("{}")
    fields = json.loads(make_pipeline(FakeDenoiser()).bundle.manifest.to_json())
    files = {name: sha256_of_file(path / name) for name in (GRAPH, "parity.json")}
    fields.pop("sha256")
    fields |= {"files": files, "format_version": 3, "build_key": "key"}
    (path / MANIFEST).write_text(_manifest(fields))
    (plans / PLAN).write_bytes(b"vtrt a plan" * 100)
    (plans / PLAN_MANIFEST).write_text(_plan_manifest(plans))
    return path


def _manifest(fields: dict[str, object]) -> str:
    """A manifest whose own digest is right: whoever changes it can make it so."""
    plain = dict(fields)
    plain.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**plain, "sha256": digest}, indent=2, sort_keys=True) + "\n"
    Manifest.from_json(text, source="the test's")
    return text


def _plan_manifest(plans: Path) -> str:
    spec = PlanSpec(
        file=PLAN,
        sha256=sha256_of_file(plans / PLAN),
        key="key",
        sources={},
        precision="fp16",
        inputs=[],
        outputs=[],
        profiles=[],
    )
    return PlanManifest(
        format_version=PLAN_VERSION,
        target="rtx:sm86",
        library="tensorrt_rtx",
        library_version="1.4",
        buckets=[],
        bundle_build_key="key",
        plan_key="key",
        components={"denoiser": spec},
    ).to_json()


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def signed(bundle: Path, keys: Path) -> Path:
    sign_bundle(bundle, read_private_key(keys))
    return bundle


def test_a_signed_bundle_is_accepted(signed: Path, keys: Path) -> None:
    check_bundle(signed, [public(keys)])
    check_bundle(signed, [public(keys.with_name("other")), public(keys)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (MANIFEST, f"{MANIFEST} is not what was signed"),
        (f"{MANIFEST}.sig", MANIFEST),
        (f"{TARGET_FOLDER}/{PLAN_MANIFEST}", f"{PLAN_MANIFEST} is not what was signed"),
        (f"{TARGET_FOLDER}/{PLAN_MANIFEST}.sig", PLAN_MANIFEST),
        (f"{TARGET_FOLDER}/{PLAN}", f"{PLAN} is corrupted: SHA-256"),
    ],
)
def test_one_byte_is_enough(signed: Path, keys: Path, name: str, message: str) -> None:
    for at in (0, None, -2):
        content = (signed / name).read_bytes()
        flip(signed / name, at)
        with pytest.raises(BundleError, match=message):
            check_bundle(signed, [public(keys)])
        (signed / name).write_bytes(content)
    check_bundle(signed, [public(keys)])


def test_a_manifest_made_to_fit_a_changed_graph_is_refused(signed: Path, keys: Path) -> None:
    """What the digests alone do not find: they are all right."""
    flip(signed / GRAPH)
    fields = json.loads((signed / MANIFEST).read_text())
    fields["files"][GRAPH] = sha256_of_file(signed / GRAPH)
    (signed / MANIFEST).write_text(_manifest(fields))
    read_manifest(signed)
    with pytest.raises(BundleError, match="not what was signed"):
        check_bundle(signed, [public(keys)])


def test_a_plan_with_a_manifest_made_to_fit_is_refused(signed: Path, keys: Path) -> None:
    plans = signed / TARGET_FOLDER
    flip(plans / PLAN)
    (plans / PLAN_MANIFEST).write_text(_plan_manifest(plans))
    with pytest.raises(BundleError, match="not what was signed"):
        check_bundle(signed, [public(keys)])


def _remove_signature(path: Path, _keys: Path) -> None:
    (path / f"{MANIFEST}.sig").unlink()


def _remove_plan_signature(path: Path, _keys: Path) -> None:
    (path / TARGET_FOLDER / f"{PLAN_MANIFEST}.sig").unlink()


def _sign_by_another(path: Path, keys: Path) -> None:
    sign_bundle(path, read_private_key(keys.with_name("other")))


def _claim_the_key(path: Path, keys: Path) -> None:
    """Another's signature under the name of the trusted key."""
    trusted = (path / f"{MANIFEST}.sig").read_text().split(" ")[1]
    _sign_by_another(path, keys)
    text = (path / f"{MANIFEST}.sig").read_text().split(" ")
    (path / f"{MANIFEST}.sig").write_text(" ".join((text[0], trusted, text[2])))


def _signature_of_the_plans(path: Path, _keys: Path) -> None:
    shutil.copy(path / TARGET_FOLDER / f"{PLAN_MANIFEST}.sig", path / f"{MANIFEST}.sig")


def _signed_under_another_name(path: Path, keys: Path) -> None:
    sign_file(path / MANIFEST, read_private_key(keys), name=PLAN_MANIFEST)


def _add_file(path: Path, _keys: Path) -> None:
    (path / "denoiser.onnx.data").write_bytes(b"weights that a graph may look for")


def _add_plan(path: Path, _keys: Path) -> None:
    (path / TARGET_FOLDER / "text_encoder.plan").write_bytes(b"vtrt")


def _add_plans(path: Path, _keys: Path) -> None:
    (path / "plans" / "rtx-sm89").mkdir()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_remove_signature, "is not signed: bundle.json.sig is missing"),
        (_remove_plan_signature, "is not signed: plan.json.sig is missing"),
        (_sign_by_another, "is signed by .*, and not by key"),
        (_claim_the_key, "is not what was signed"),
        (_signature_of_the_plans, "is not what was signed"),
        (_signed_under_another_name, "is not what was signed"),
        (_add_file, "denoiser.onnx.data is not covered by the signature"),
        (_add_plan, "text_encoder.plan is not covered by the signature"),
        (_add_plans, "rtx-sm89.*cannot be read"),
    ],
)
def test_what_is_not_signed_by_a_trusted_key_is_refused(
    signed: Path, keys: Path, tamper: Callable[[Path, Path], None], message: str
) -> None:
    tamper(signed, keys)
    with pytest.raises(BundleError, match=message):
        check_bundle(signed, [public(keys)])


async def test_a_server_with_trusted_keys_opens_nothing_that_is_not_signed(
    bundle: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def open_none(path: Path, **_settings: object) -> Pipeline:
        opened.append(path)
        raise BundleError("it got as far as opening")

    monkeypatch.setattr(Pipeline, "open", open_none)
    security = SecurityConfig(trusted_keys=(public(keys),))
    config = ServerConfig(
        bundle=bundle, listen="127.0.0.1:0", security=security, model_process=False
    )
    with pytest.raises(BundleError, match="is not signed"):
        await serve(config)
    assert opened == []
    sign_bundle(bundle, read_private_key(keys))
    flip(bundle / f"{MANIFEST}.sig")
    with pytest.raises(BundleError):
        await serve(config)
    assert opened == []
    sign_bundle(bundle, read_private_key(keys))
    with pytest.raises(BundleError, match="as far as opening"):
        await serve(config)
    # Without trusted keys nothing changes: a signature is not asked for.
    (bundle / f"{MANIFEST}.sig").unlink()
    with pytest.raises(BundleError, match="as far as opening"):
        await serve(ServerConfig(bundle=bundle, listen="127.0.0.1:0", model_process=False))


def test_what_is_damaged_is_not_signed(bundle: Path, keys: Path) -> None:
    flip(bundle / GRAPH)
    with pytest.raises(BundleError, match="is not what bundle.json lists"):
        sign_bundle(bundle, read_private_key(keys))
    assert not (bundle / f"{MANIFEST}.sig").exists()


# Keys


def test_a_private_key_is_private_and_is_not_overwritten(tmp_path: Path) -> None:
    create_keys(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="not overwritten"):
        create_keys(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_private_key(tmp_path / "key")


def test_what_is_no_key_is_named(tmp_path: Path, keys: Path) -> None:
    text = tmp_path / "text"
    text.touch(0o600)
    with pytest.raises(ConfigError, match="not a private key"):
        read_private_key(text)
    with pytest.raises(ConfigError, match="not a public key"):
        read_public_key(text)
    with pytest.raises(ConfigError, match="not a public key"):
        read_public_key(keys)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_public_key(tmp_path / "none")


def test_the_commands_make_keys_sign_and_verify(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "k"
    assert main(["keys", "create", "--output", str(key)]) == 0
    trusted = ["--trusted-key", f"{key}.pub"]
    assert main(["keys", "verify", str(bundle), *trusted]) == 1
    assert "is not signed" in capsys.readouterr().err
    assert main(["keys", "sign", str(bundle), "--key", str(key)]) == 0
    check_bundle(bundle, [public(key)])


def test_signatures_are_not_needed_where_they_are_not_used() -> None:
    """The base install has no `cryptography`."""
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import engine.serving.server, oneword.serve, oneword.tokens, build_engines, pathlib\n"
        "from engine.errors import ConfigError\n"
        "from engine.security.signing import create_keys\n"
        "try: create_keys(pathlib.Path('nowhere'))\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'oneword[signing]'" in done.stdout, done.stderr


def test_a_build_signs_what_it_has_built_and_vouches_for_nothing_else(
    bundle: Path, keys: Path
) -> None:
    key = read_private_key(keys)

    def report(*, was_built: bool, compiled: tuple[str, ...]) -> Any:
        return SimpleNamespace(path=bundle, was_built=was_built, compiled=compiled)

    with pytest.raises(BundleError, match="built earlier.*oneword keys sign"):
        sign_report(report(was_built=False, compiled=("rtx:sm86",)), key)
    assert not (bundle / f"{MANIFEST}.sig").exists()
    with pytest.raises(BundleError, match="not covered|not signed"):
        (bundle / TARGET_FOLDER / f"{PLAN_MANIFEST}.sig").unlink()
        sign_report(report(was_built=True, compiled=()), key)
    sign_report(report(was_built=True, compiled=("rtx:sm86",)), key)
    check_bundle(bundle, [public(keys)])
    (bundle / TARGET_FOLDER / PLAN_MANIFEST).write_text(_plan_manifest(bundle / TARGET_FOLDER))
    sign_report(report(was_built=False, compiled=("rtx:sm86",)), key)
    sign_report(report(was_built=False, compiled=()), key)
    check_bundle(bundle, [public(keys)])
