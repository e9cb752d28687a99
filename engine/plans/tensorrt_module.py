"""TensorRT for RTX and TensorRT behind one name; alone in importing either.

What is used here of their Python API is the same in both (seen in the bindings of tensorrt_rtx
1.7.1 and of tensorrt_cu13 11.4.0); what only one of them has is asked for by name at its place.
"""

import importlib
from typing import Any, Literal

from engine.errors import ProviderUnavailable

Kind = Literal["rtx", "trt"]
MODULES: dict[Kind, str] = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
TITLES: dict[Kind, str] = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}
_EXTRAS: dict[Kind, str] = {"rtx": "rtx", "trt": "tensorrt"}
# Strongly typed networks only, as this code makes them; before it, precision was a builder flag.
_LEAST_MAJOR: dict[Kind, int] = {"rtx": 1, "trt": 11}


def import_tensorrt(kind: Kind) -> Any:
    """The module that compiles and runs plans of a kind.

    Raises `ProviderUnavailable` that says how to get it.
    """
    remedy = f"`pip install oneword[{_EXTRAS[kind]}]`"
    try:
        module = importlib.import_module(MODULES[kind])
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
        raise ProviderUnavailable(
            f"{TITLES[kind]} is not installed or cannot be loaded ({error}); {remedy}"
        ) from error
    if int(module.__version__.split(".")[0]) < _LEAST_MAJOR[kind]:
        raise ProviderUnavailable(
            f"{TITLES[kind]} is version {module.__version__}, needed is {_LEAST_MAJOR[kind]} or "
            f"newer; {remedy}"
        )
    return module


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors for our messages, and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def summary(self) -> str:
            return "; ".join(self.errors[:3]) or "TensorRT gave no reason"

    return Logger()
