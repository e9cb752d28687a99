"""Settings by file and flags: what is set is what counts, and what is not known is refused."""

import argparse
import dataclasses
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest

from engine.config_file import build, read_config_file
from engine.config_text import example, field_comments, to_toml
from engine.errors import ConfigError
from engine.serving.server_config import ServerConfig
from oneword import serve
from oneword.config_flags import Flag, add_config_flags, given_settings
from tests.conftest import ROOT

DEFAULT = ServerConfig(bundle=Path("/bundle"))


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    ratio: float = 0.5  # beside
    # above, in
    # two lines
    names: tuple[str, ...] = ("a",)
    kinds: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Every type that a setting can have."""

    path: Path
    maybe: Path | None = None
    text: str = "x"
    number: int = 1
    flag: bool = False
    mode: Literal["slow", "fast"] = "slow"
    colour: Colour = Colour.RED
    paths: tuple[Path, ...] = ()
    secret: str = field(default="", repr=False)
    inner: Inner = field(default_factory=Inner)


def read(text: str, kind: type = ServerConfig, **settings: Any) -> Any:
    return build(kind, tomllib.loads(text), folder=Path("/etc/oneword"), **settings)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def changed(value: Any) -> Any:
    """Another value that is as good; None where none is known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 if isinstance(value, float) else None


# There and back


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text": 'quote " backslash \\ newline \n tab \t bell \x07 delete \x7f umlaut ü 🦉 \u2028'},
        {"text": "", "number": -(2**62), "flag": True, "mode": "fast", "colour": Colour.BLUE},
        {"maybe": Path("/a b/c'd"), "paths": (Path("/x"), Path("/y"))},
        {"inner": Inner(ratio=1e300, names=(), kinds=frozenset({"b", "a"}))},
        {"inner": Inner(ratio=float("inf"), names=("a, b", "]"))},
    ],
)
def test_what_is_written_is_read_back(settings: dict[str, Any]) -> None:
    sample = Sample(path=Path("/p"), **settings)
    assert read(to_toml(sample), Sample) == sample


def test_every_setting_of_the_server_survives_the_file() -> None:
    assert read(to_toml(DEFAULT)) == DEFAULT
    for name, value in leaves(DEFAULT):
        other = changed(value)
        if other is None:
            continue
        table, _, key = name.rpartition(".")
        text = f"[{table}]\n" * bool(table) + f"{key} = {str(other).lower()}\n"
        config = read(text, overrides={"bundle": Path("/bundle")})
        assert dict(leaves(config)) == {**dict(leaves(DEFAULT)), name: other}, name
        assert read(to_toml(config)) == config, name


def test_paths_are_in_the_folder_of_the_file() -> None:
    config = read('bundle = "b"\nconcept_dir = "/var/words"')
    assert config.bundle == Path("/etc/oneword/b")
    assert config.concept_dir == Path("/var/words")


def test_a_printed_path_means_the_same_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    text = to_toml(ServerConfig(bundle=Path("b")))
    assert read(text).bundle == Path("/b")


def test_a_secret_is_not_printed() -> None:
    assert "hush" not in to_toml(Sample(path=Path("/p"), secret="hush"))


def test_a_whole_number_is_a_number_too() -> None:
    assert read('bundle = "b"\ngrace_s = 5').grace_s == 5.0


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bundle is missing; set it there, or give --bundle"),
        ("bundel = 1", "unknown key 'bundel'; did you mean bundle?"),
        ("[bather]", r"unknown key 'bather'; did you mean batcher\?"),
        ("[batcher]\nmax_rows = 1", r"'max_rows' in \[batcher\]; did you mean max_batch_rows\?"),
        ("[training.limits]\nzzz = 1", r"'zzz' in \[training.limits\]; known are max_batch_size"),
        ("batcher = 1", r"batcher must be a table: \[batcher\], got '1'"),
        ("bundle = 1", "bundle must be a path in quotes, got '1'"),
        ("grace_s = '5'", "grace_s must be a number, got '5'"),
        ("grace_s = true", "grace_s must be a number"),
        ("grace_s = nan", "grace_s must be a number"),
        ("host_threads = 2.0", "host_threads must be a whole number, got '2.0'"),
        ("host_threads = true", "host_threads must be a whole number"),
        ("reflection = 1", "reflection must be true or false"),
        ("[operations]\nlog_format = 'xml'", "log_format must be one of 'text', 'json', got 'xml'"),
        ("host_threads = 0", "host_threads must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given = {} if not text or text.startswith("bund") else {"bundle": Path("b")}
        read(text, overrides=given)


@pytest.mark.parametrize(("value", "message"), [([1], "a string"), ("a", r"a list: \[...\]")])
def test_lists_are_checked_item_by_item(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Inner, {"names": value})


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="x.toml is not TOML"):
        read_config_file(path)
    path.write_text("a = [")
    with pytest.raises(ConfigError, match="x.toml is not TOML"):
        read_config_file(path)
    with pytest.raises(ConfigError, match="y.toml cannot be read"):
        read_config_file(tmp_path / "y.toml")


# Flags


def configured(*words: str) -> ServerConfig:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.config_from(parser.parse_args(words))


def test_flags_overrule_the_file_and_leave_the_rest_to_it(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(
        'bundle = "b"\ngrace_s = 1.0\nreflection = false\n[batcher]\nmax_queued_images = 7\n'
        "max_batch_rows = 3\n"
    )
    config = configured("--config", str(path), "--grace-s", "2", "--max-batch-rows", "4")
    assert (config.grace_s, config.batcher.max_batch_rows) == (2.0, 4)
    assert (config.bundle, config.batcher.max_queued_images) == (tmp_path / "b", 7)
    assert not config.reflection
    assert configured("--config", str(path), "--reflection").reflection
    # A path on the command line is that of the shell.
    assert configured("--config", str(path), "--bundle", "c").bundle == Path("c")


def test_without_a_file_the_defaults_count() -> None:
    assert configured("--bundle", "/bundle") == DEFAULT
    assert configured("--bundle", "/bundle", "--insecure").insecure
    with pytest.raises(ConfigError, match="the flags: bundle is missing"):
        configured()


def test_every_kind_of_setting_can_be_a_flag() -> None:
    parser = argparse.ArgumentParser()
    flags = {
        "maybe": "x",
        "flag": Flag("x", "open", True),
        "mode": "x",
        "number": "x",
        "paths": Flag("x", "trusted-key"),
        "inner.ratio": "x",
    }
    add_config_flags(parser, Sample, flags)
    words = "--open --mode fast --number 3 --trusted-key a --trusted-key b --ratio 0.25 --maybe m"
    given = given_settings(parser.parse_args(words.split()))
    assert build(Sample, {"path": "/p"}, overrides=given) == Sample(
        path=Path("/p"),
        maybe=Path("m"),
        flag=True,
        mode="fast",
        number=3,
        paths=(Path("a"), Path("b")),
        inner=Inner(ratio=0.25),
    )
    assert given_settings(parser.parse_args([])) == {}


def test_print_config_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    words = ["--bundle", "/b", "--max-pixels", "4096", "--log-format", "json", "--print-config"]
    arguments = parser.parse_args(words)
    assert serve.run(arguments) == 0
    path = tmp_path / "printed.toml"
    path.write_text(capsys.readouterr().out)
    assert configured("--config", str(path)) == serve.config_from(arguments)


def test_a_missing_package_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    for flag, value in (("--metrics-listen", "0"), ("--trace-exporter", "console")):
        with pytest.raises(ConfigError, match="pip install 'oneword"):
            serve.run(parser.parse_args(["--bundle", "/no/bundle", flag, value]))


# The example


def test_the_example_has_every_setting_and_is_up_to_date() -> None:
    text = (ROOT / "examples" / "server.toml").read_text()
    remedy = "run: oneword serve --example-config > examples/server.toml"
    assert text == example(ServerConfig(bundle=Path("bundles/emoji"))), remedy
    live = "\n".join(
        line.removeprefix("# ") for line in text.splitlines() if " = " in line or "[" in line
    )
    unset = [line for line in live.splitlines() if line.endswith("(not set)")]
    set_to_default = "\n".join(line for line in live.splitlines() if line not in unset)
    assert read(set_to_default) == dataclasses.replace(
        DEFAULT, bundle=Path("/etc/oneword/bundles/emoji")
    )
    named = {line.split(" = ")[0] for line in live.splitlines()}
    assert {name.rpartition(".")[2] for name, _ in leaves(DEFAULT)} <= named


def test_every_setting_says_what_it_is() -> None:
    def check(config: Any) -> None:
        comments = field_comments(type(config))
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            if dataclasses.is_dataclass(value):
                check(value)
            else:
                assert comments.get(item.name), f"{type(config).__name__}.{item.name}: no comment"

    check(DEFAULT)
    assert field_comments(Inner) == {"ratio": "beside", "names": "above, in two lines", "kinds": ""}
