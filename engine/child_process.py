"""What all processes that the server starts have in common."""

import os
import signal
import sys


def child_environment() -> dict[str, str]:
    """The server's own, with its very path of packages: the two sides must be of one version."""
    packages = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": packages}


def describe_end(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
