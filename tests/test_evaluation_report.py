"""The report of an evaluation: written, read again, and shown."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests import evaluation_setup
from tests.evaluation_setup import run_command
from trainer.evaluation_errors import ReportError
from trainer.evaluation_report import (
    EvaluationReport,
    read_report,
    report_from_json,
    report_to_json,
    text_table,
)

# Fixtures.
pipeline, folder, command = (
    evaluation_setup.pipeline,
    evaluation_setup.folder,
    evaluation_setup.command,
)


@pytest.fixture
def report(command: list[str], tmp_path: Path) -> EvaluationReport:
    assert run_command(command) == 0
    return read_report(tmp_path / "out" / "report.json")


def test_a_report_is_the_same_after_a_round_trip(report: EvaluationReport) -> None:
    again = report_from_json(report_to_json(report))
    assert again == report
    assert report_to_json(again) == report_to_json(report)


def test_the_table_says_what_was_measured_and_with_what(report: EvaluationReport) -> None:
    table = text_table(report)
    assert "3 prompts, 2 pictures each for seed 0, 1; ddim, 2 steps, guidance 5, 64 x 64" in table
    assert "judges colours" in table
    assert "the paper drew 64 pictures" in table
    value = report.judged[0].measures["colours"]["image_similarity"]
    assert value.std is not None
    assert f"{value.mean:.3f} +-{value.std:.3f}" in table
    hostile = dataclasses.replace(report.judged[0], label="\x1b[2J")
    assert "\x1b" not in text_table(dataclasses.replace(report, judged=(hostile,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "oneword-evaluation/9"}, "of schema 'oneword-evaluation/9', this version"),
        ({"judged": None}, "is not a whole report: 'None' is not of type list"),
        ({"seconds": "many"}, "'many' is not of type"),
        ({"drawing": {}}, "'model_name'"),
        ({"caveats": [1]}, "'1' is not of type str"),
    ],
)
def test_broken_reports_are_refused(
    report: EvaluationReport, change: dict[str, Any], message: str
) -> None:
    stored = {**json.loads(report_to_json(report)), **change}
    with pytest.raises(ReportError) as error:
        report_from_json(json.dumps(stored).encode())
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_report_is_refused(content: bytes) -> None:
    with pytest.raises(ReportError, match="is not JSON|of schema"):
        report_from_json(content)
