"""Options, shape checks and the fixtures that several test files share."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Shape annotations are checked in tests and free in production.
install_import_hook("engine", "beartype.beartype")


ROOT = Path(__file__).resolve().parent.parent
EMOJI_MODEL = ROOT / "models" / "emoji"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow")
    parser.addoption("--run-gpu", action="store_true", help="run tests marked gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ("slow", "gpu"):
        if not config.getoption(f"--run-{mark}"):
            for item in items:
                if mark in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"needs --run-{mark}"))
