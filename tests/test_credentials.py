"""The credentials file: what it may say, who may read it, how tokens come and go."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engine.errors import ConfigError, Unauthenticated
from engine.security.callers import Scope
from engine.security.credential_edits import create_token, list_tokens, revoke_token
from engine.security.credentials import (
    TOKEN,
    Credentials,
    identities_of,
    parse_credentials,
    read_credentials,
)
from engine.security.rate_limits import Quota
from oneword.cli import main

SOUND = """
[defaults]
burst = 7
[tenants.acme]
requests_per_second = 5.5
[[tokens]]
id = "abcdefghijklmnop"
sha256 = "{digest}"
tenant = "acme"
name = "ci"
scopes = ["generate", "train"]
expires = 2030-01-01T02:00:00+02:00
[[certificates]]
identity = "dns:ci.acme.example"
tenant = "acme"
name = "ci"
scopes = ["admin"]
[[certificates]]
identity = "uri:spiffe://acme/ci"
tenant = "acme"
name = "spiffe"
scopes = ["admin"]
[[certificates]]
identity = "cn:old"
tenant = "old"
name = "old"
scopes = ["admin"]
""".format(digest=hashlib.sha256(b"a" * 52).hexdigest())


def parse(text: str) -> Credentials:
    return parse_credentials(text, source="file")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "credentials.toml"
    path.touch(0o600)
    path.write_text(SOUND)
    return path


# What it says


def test_a_sound_file_is_read_whole() -> None:
    credentials = parse(SOUND)
    found = credentials.of_header("Bearer ow_abcdefghijklmnop_" + "a" * 52)
    assert (found.caller.tenant, found.caller.name) == ("acme", "ci")
    assert found.caller.scopes == {Scope.GENERATE, Scope.TRAIN}
    assert found.expires == datetime(2030, 1, 1, tzinfo=UTC)
    assert credentials.quota("acme") == Quota(requests_per_second=5.5, burst=7)
    assert credentials.quota("other") == Quota(burst=7)


def test_a_secret_is_not_in_a_representation() -> None:
    digest = hashlib.sha256(b"a" * 52).hexdigest()
    assert digest in SOUND and digest not in repr(parse(SOUND))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"generate", "train"', '"everything"'), "scopes must be a list of generate, concepts"),
        (('["generate", "train"]', "[]"), "scopes must be a list"),
        (('["generate", "train"]', '"generate"'), "scopes must be a list"),
        (('name = "ci"', 'name = "a\\u001b[31m"'), "name must be 1 to 64 letters"),
        (('tenant = "acme"', 'tenant = ""'), "tenant must be 1 to 64"),
        (('tenant = "acme"', "tenant = 7"), "tenant is missing or malformed"),
        (('id = "abcdefghijklmnop"', 'id = "short"'), "id is missing or malformed"),
        (('sha256 = "', 'sha256 = "x'), "sha256 is missing or malformed"),
        (("+02:00", ""), "expires must be a time with its offset"),
        (("burst = 7", "burst = 0"), "burst must be at least 1"),
        (("burst = 7", "burst = true"), "defaults.burst must be a number"),
        (("burst = 7", "bursts = 7"), "unknown keys: 'bursts'; known: burst"),
        (("[defaults]", "[default]"), "unknown keys: 'default'"),
        (('name = "ci"', 'name = "ci"\nadmin = true'), "unknown keys: 'admin'"),
        (("uri:spiffe://acme/ci", "dns:ci.acme.example"), "dns:ci.acme.example is there twice"),
        (("uri:spiffe://acme/ci", "email:a@b"), "identity is missing or malformed"),
        (("[[tokens]]", "[tokens]"), "tokens must be tables"),
        (("[defaults]", "[defaults"), "file is not TOML"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_sound_is_refused_by_name(change: tuple[str, str], message: str) -> None:
    text = SOUND.replace(*change)
    assert text != SOUND
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(text)


# Certificates


@pytest.mark.parametrize(
    ("auth_context", "tenant"),
    [
        ({"peer_dns": [b"ci.acme.example"]}, "acme"),
        ({"peer_uri": [b"spiffe://acme/ci"]}, "acme"),
        ({"x509_common_name": [b"old"]}, "old"),
        # Of somebody who may choose a common name, but not the DNS name that was vouched for.
        ({"peer_dns": [b"other.example"], "x509_common_name": [b"old"]}, None),
        ({"peer_dns": [b"ci.acme.example"], "peer_uri": [b"spiffe://acme/ci"]}, None),
        ({"x509_common_name": [b"dns:ci.acme.example"]}, None),
        ({"x509_common_name": [b"ci.acme.example"]}, None),
        ({"peer_dns": [b"CI.acme.example\x00.evil"]}, None),
        ({}, None),
    ],
)
def test_a_certificate_is_known_by_what_was_vouched_for(
    auth_context: dict[str, list[bytes]], tenant: str | None
) -> None:
    credentials = parse(SOUND)
    if tenant is None:
        with pytest.raises(Unauthenticated):
            credentials.of_certificate(auth_context)
    else:
        assert credentials.of_certificate(auth_context).caller.tenant == tenant


def test_names_of_a_certificate_are_told_apart_by_kind() -> None:
    context = {"peer_dns": [b"a", b"b"], "peer_uri": [b"c"], "x509_common_name": [b"d"]}
    assert identities_of(context) == ["dns:a", "dns:b", "uri:c"]


# Who may read it


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602, 0o777])
def test_a_file_that_others_can_read_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*chmod 600"):
        read_credentials(path)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_private_file_is_read(path: Path, mode: int) -> None:
    path.chmod(mode)
    assert len(read_credentials(path).by_key) == 4


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing.toml cannot be read"):
        read_credentials(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_credentials(tmp_path)


# How tokens come and go


def test_a_new_file_is_private_and_holds_no_token(tmp_path: Path) -> None:
    path = tmp_path / "credentials.toml"
    before = os.umask(0)
    try:
        new = create_token(path, tenant="acme", name="ci", scopes=["generate"])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    token = TOKEN.fullmatch(new.token)
    assert token and token[1] == new.token_id
    assert token[2] not in path.read_text()
    assert read_credentials(path).of_header(f"Bearer {new.token}").caller.tenant == "acme"
    assert list(tmp_path.iterdir()) == [path], "no lock and no part of a file stays"


def test_tokens_are_of_256_random_bits(tmp_path: Path) -> None:
    path = tmp_path / "credentials.toml"
    tokens = [create_token(path, tenant="a", name="b", scopes=["train"]).token for _ in range(20)]
    secrets = {token.split("_")[2] for token in tokens}
    assert len(secrets) == 20 and {len(secret) for secret in secrets} == {52}  # 52 x 5 >= 256


def test_a_change_leaves_all_else_as_it_was_written(path: Path) -> None:
    text = SOUND + "\n# a note of the operator's\n"
    path.write_text(text)
    new = create_token(path, tenant="acme", name="new", scopes=["train", "generate"])
    assert path.read_text().startswith(text.rstrip())
    assert len(read_credentials(path).by_key) == 5
    revoke_token(path, new.token_id)
    assert path.read_text().strip() == text.strip()
    revoke_token(path, "abcdefghijklmnop")
    assert "a note" in path.read_text() and "ci.acme.example" in path.read_text()
    assert [credential.key for credential in list_tokens(path)] == [
        "dns:ci.acme.example",
        "uri:spiffe://acme/ci",
        "cn:old",
    ]
    assert read_credentials(path).quota("acme").burst == 7


def test_what_cannot_be_changed_safely_is_left_to_a_person(path: Path) -> None:
    inline = (
        'tokens = [{ id = "abcdefghijklmnop", sha256 = "' + "0" * 64 + '", tenant = "a", '
        'name = "b", scopes = ["train"] }]\n'
    )
    path.write_text(inline)
    with pytest.raises(ConfigError, match="edit it by hand"):
        create_token(path, tenant="a", name="b", scopes=["train"])
    with pytest.raises(ConfigError, match="edit it by hand"):
        revoke_token(path, "abcdefghijklmnop")
    assert path.read_text() == inline


def test_a_broken_file_is_not_changed(path: Path) -> None:
    path.write_text("[[tokens]]\nid = 1\n")
    with pytest.raises(ConfigError):
        create_token(path, tenant="a", name="b", scopes=["train"])
    assert path.read_text() == "[[tokens]]\nid = 1\n"


def test_unknown_ids_and_bad_names_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="no token 'x'"):
        revoke_token(path, "x")
    with pytest.raises(ConfigError, match="tenant must be"):
        create_token(path, tenant='a"\n[defaults]', name="b", scopes=["train"])
    with pytest.raises(ConfigError, match="scopes must be"):
        create_token(path, tenant="a", name="b", scopes=["everything"])
    for days in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(ConfigError, match="expires_in_days"):
            create_token(path, tenant="a", name="b", scopes=["train"], expires_in_days=days)
    assert path.read_text() == SOUND


def test_changes_at_once_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(
            pool.map(
                lambda n: create_token(path, tenant="a", name=f"n{n}", scopes=["train"]), range(16)
            )
        )
    known = read_credentials(path).by_key
    assert {f"token {new.token_id}" for new in made} <= set(known)


def test_a_link_to_the_file_stays_one(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    create_token(link, tenant="a", name="b", scopes=["train"])
    assert link.is_symlink() and len(read_credentials(path).by_key) == 5


def test_the_command_shows_a_token_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--file", str(tmp_path / "credentials.toml")]
    create = ["tokens", "create", *file, "--tenant", "acme", "--name", "ci"]
    assert main([*create, "--scopes", "generate,concepts", "--expires-in-days", "30"]) == 0
    token = capsys.readouterr().out.strip()
    assert TOKEN.fullmatch(token)
    token_id, secret = token.split("_")[1:]
    assert main(["tokens", "list", *file]) == 0
    shown = capsys.readouterr().out
    assert token_id in shown and "acme" in shown and "generate,concepts" in shown
    assert secret not in shown and hashlib.sha256(secret.encode()).hexdigest() not in shown
    assert main(["tokens", "revoke", *file, token_id]) == 0
    assert main(["tokens", "revoke", *file, token_id]) == 1
    assert "no token" in capsys.readouterr().err
