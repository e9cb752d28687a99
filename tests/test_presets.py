"""Presets: what each sets, and that what is given explicitly wins."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from trainer import cli
from trainer.errors import LearningError
from trainer.learn_arguments import options_from
from trainer.options import LearnOptions
from trainer.presets import PRESETS, check_captions, preset_options

FIXED = ["images", "--model", "m", "--output", "o", "--placeholder-token", "<x>"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser


def _options(*flags: str) -> LearnOptions:
    return options_from(_parser().parse_args([*FIXED, *flags]))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("2-vectors", {"num_vectors": 2}),
        ("3-vectors", {"num_vectors": 3}),
        ("progressive", {"num_vectors": 3, "progressive": True}),
        ("regularized", {"regularization": 0.1}),
        ("per-image-tokens", {"per_image_tokens": True}),
        ("human-captions", {}),
        ("style", {"learnable_property": "style"}),
        ("paper", {"optimizer": "adamw", "steps": 5000, "batch_size": 8}),
    ],
)
def test_a_preset_changes_these_options_alone(name: str, changed: dict[str, Any]) -> None:
    assert _options("--preset", name) == dataclasses.replace(LearnOptions(), **changed)


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        # The paper's base rates, and its 2 x 4 samples in a step.
        (["--preset", "paper"], 5e-3 * 8),
        (["--preset", "paper-low-lr"], 1e-4 * 8),
        (["--preset", "paper-high-lr"], 2e-2 * 8),
        (["--preset", "paper-high-lr", "--batch-size", "4"], 2e-2 * 4),
        (["--preset", "paper-high-lr", "--batch-size", "100"], 1.0),
        (["--preset", "paper-low-lr", "--learning-rate", "0.3"], 0.3),
        (["--preset", "paper-low-lr", "--preset", "paper"], 5e-3 * 8),
        (["--preset", "paper-low-lr", "--preset", "2-vectors"], 1e-4 * 8),
        (["--preset", "paper", "--optimizer", "dti"], 0.04),
    ],
)
def test_rates_of_the_paper_are_scaled_by_the_batch(flags: list[str], rate: float) -> None:
    assert _options(*flags).rate == pytest.approx(rate)


@pytest.mark.parametrize("order", [0, 1])
def test_given_options_win_over_presets_wherever_they_stand(order: int) -> None:
    preset, given = ["--preset", "progressive"], ["--num-vectors", "2", "--steps", "400"]
    options = _options(*(preset + given, given + preset)[order])
    assert options == LearnOptions(num_vectors=2, progressive=True)
    # A default that is given is given.
    assert _options("--preset", "paper", "--steps", "400").steps == 400
    assert _options("--preset", "paper", "--optimizer", "adam").optimizer == "adam"


def test_presets_add_up_and_the_later_wins() -> None:
    options = _options("--preset", "paper", "--preset", "3-vectors", "--preset", "2-vectors")
    assert (options.optimizer, options.num_vectors) == ("adamw", 2)


def test_an_option_that_cannot_be_with_a_preset_is_refused() -> None:
    with pytest.raises(LearningError, match="progressive and per_image_tokens"):
        _options("--preset", "progressive", "--preset", "per-image-tokens")


def test_an_unknown_preset_is_refused_with_those_that_are_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        _options("--preset", "papre")
    assert "per-image-tokens" in capsys.readouterr().err
    with pytest.raises(LearningError, match="unknown preset 'papre'; choose from paper, "):
        preset_options(["papre"], {})


def test_help_and_documentation_name_every_preset() -> None:
    text = " ".join(_parser().format_help().split())
    page = (Path(__file__).parents[1] / "docs" / "paper-variants.md").read_text()
    for name, preset in PRESETS.items():
        assert f"`{name}`" in page
        # Help breaks lines at hyphens as well.
        assert f"{name}: {preset.summary}".replace(" ", "") in text.replace(" ", "")


def test_captions_preset_needs_captions_for_every_image() -> None:
    check_captions(["2-vectors"], {"0.png": False})
    check_captions(["human-captions"], {"0.png": True, "1.png": True})
    with pytest.raises(LearningError, match="2 of 3 have none, such as 1.png: write them into a"):
        check_captions(["paper", "human-captions"], {"0.png": True, "1.png": False, "2.png": False})
