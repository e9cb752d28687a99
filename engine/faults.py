"""Bugs, told in the log without what callers wrote."""

import logging
import traceback
from types import TracebackType


def log_fault(logger: logging.Logger, error: BaseException, what: str, *words: object) -> None:
    """An error line without the words of the exceptions, which are told at the level DEBUG."""
    logger.error(f"{what}: %s", *words, describe_fault(error))
    logger.debug(what, *words, exc_info=error)


def describe_fault(error: BaseException) -> str:
    """What went wrong and where, without the words of the exceptions.

    Those may hold what a caller wrote: a prompt, say.
    """
    kinds: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(kinds) < 8:
        kinds.append(f"{type(cause).__name__} at {_place(cause.__traceback__)}")
        cause = cause.__cause__ or cause.__context__
    return ", from ".join(kinds)


def _place(trace: TracebackType | None, most: int = 4) -> str:
    """The innermost calls, the last one first."""
    frames = traceback.extract_tb(trace)[-most:]
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    return " < ".join(places) or "an unknown place"
