"""A training in memory, and one attempt at it: a process from its start to its end."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.child_process import describe_end
from engine.training.child import TrainingChild
from engine.training.reports import Failure, Progress, Report, Skipped
from engine.training.store import StoredTraining

logger = logging.getLogger(__name__)

INTERRUPTED = Failure(reason="interrupted", retryable=True)


class Job:
    """A training in memory. Whoever waits for a change of it takes `changed` before `state`."""

    def __init__(self, stored: StoredTraining) -> None:
        self.folder = stored.folder
        self.record = stored.record
        self.state = stored.state
        self.changed = asyncio.Event()
        self.interrupted = asyncio.Event()  # its process is to end: cancelled, or the server stops
        self.transition = asyncio.Lock()  # held from reading the state to having changed it
        self.launched = False

    @property
    def training_id(self) -> str:
        return self.record.training_id

    def announce(self, **changes: Any) -> None:
        """Change the state in memory and wake those who wait for it."""
        self.state = replace(self.state, **changes)
        before, self.changed = self.changed, asyncio.Event()
        before.set()


async def attempt(job: Job, command: Sequence[str], *, stop_grace_s: float) -> Failure | None:
    """Run one learning process to its end, which `job.interrupted` hastens.

    Returns why there is no result; None where there is one.
    """
    try:
        child = await TrainingChild.start(command, job.folder)
    except OSError as error:
        return Failure(
            reason=f"the learning process cannot be started: {error.strerror}", retryable=True
        )
    interrupt = asyncio.create_task(_interrupt(job, child, stop_grace_s))
    try:
        return await _listen(job, child)
    finally:
        interrupt.cancel()


async def _interrupt(job: Job, child: TrainingChild, stop_grace_s: float) -> None:
    await job.interrupted.wait()
    await child.stop(stop_grace_s)


async def _listen(job: Job, child: TrainingChild) -> Failure | None:
    """Take in the reports of a process until it has ended; None if it ended well."""
    failure: Failure | None = None
    try:
        async for report in child.reports():
            if isinstance(report, Failure):
                failure = report
            else:
                _heed(job, report)
    except ValueError:
        logger.exception("training %s: the learning process is not understood", job.training_id)
        child.kill()
    code = await child.wait()
    if code == 0 and await asyncio.to_thread(job.folder.concept.exists):
        return None
    return failure or Failure(
        reason=f"the learning process ended unexpectedly, {describe_end(code)}; if that is for "
        "want of memory, ask for a smaller batch_size",
        retryable=True,
    )


def _heed(job: Job, report: Report) -> None:
    match report:
        case Progress():
            job.announce(progress=report)
        case Skipped():
            known = {skipped.index for skipped in job.state.skipped}
            if report.index not in known:  # each process says so again
                job.announce(skipped=(*job.state.skipped, report))
        case Failure():
            pass
