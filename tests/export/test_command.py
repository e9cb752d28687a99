"""The command that builds a bundle."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import build_engines
from engine.bundle import Bundle
from trainer import export


@pytest.fixture
def quick_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`build_engines.py` with one sampler and without its signal handler."""
    monkeypatch.setattr(export, "ALL_SAMPLERS", {"ddim": export.ALL_SAMPLERS["ddim"]})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda *arguments: build_engines.main([str(argument) for argument in arguments])


def test_the_command_builds_and_says_what(
    quick_command: Callable[..., int],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert quick_command("--model", tiny_model, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "denoiser.onnx" in printed.out and "dB PSNR" in printed.out
    assert "export denoiser: " in printed.err
    assert Bundle.open(tmp_path / "out").manifest.model_name == "tiny"
    assert quick_command("--model", tiny_model, "--output", tmp_path / "out") == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "no such folder: nowhere"),
        (["--model", "./nowhere", "--target", "rtx:sm90"], "Hopper"),
    ],
)
def test_the_command_fails_in_one_line(
    quick_command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert quick_command(*arguments, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_an_interruption_of_the_command_is_exit_code_130(
    quick_command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "load_model", interrupt)
    assert quick_command("--model", "x", "--output", tmp_path / "out") == 130
    assert "interrupted; nothing was published" in capsys.readouterr().err


def test_an_error_without_words_is_told_by_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_engines.fail(OSError()) == 1
    assert capsys.readouterr().err == "build_engines.py: OSError\n"
    assert build_engines.fail("") == 1


def test_wrong_usage_is_exit_code_2() -> None:
    with pytest.raises(SystemExit) as exit_info:
        build_engines.main(["--precision", "int3"])
    assert exit_info.value.code == 2
