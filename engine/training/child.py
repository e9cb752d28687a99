"""A learning process: started, listened to, stopped.

It is a process of its own so that the server needs no PyTorch, that a crash of the one is none of
the other, and that its memory is given back. Its standard input is a pipe from the server: when the
server is gone, however that came, the pipe ends, and the process saves and ends too.
"""

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from engine.child_process import child_environment
from engine.training.folder import TrainingFolder
from engine.training.reports import MAX_LINE_BYTES, Report, from_line

logger = logging.getLogger(__name__)

WORKER_MODULE = "trainer.training_worker"


def worker_command(model: Path, *, device: str | None, checkpoint_every_s: float) -> list[str]:
    """How a learning process is started; the folder of its training is added as the last word."""
    command = [sys.executable, "-P", "-m", WORKER_MODULE, "--model", str(model.resolve())]
    command += ["--checkpoint-every-s", str(checkpoint_every_s)]
    return command + (["--device", device] if device else [])


class TrainingChild:
    """A running learning process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str], folder: TrainingFolder) -> "TrainingChild":
        """Start a process for a training; raises `OSError` where the system has no room for it."""
        with folder.log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                str(folder.path.resolve()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=MAX_LINE_BYTES,
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is for the server, which then tells its children
            )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def reports(self) -> AsyncIterator[Report]:
        """What the process says, until it ends or says what is no report."""
        assert self._process.stdout
        while line := await self._process.stdout.readline():
            yield from_line(line)

    async def wait(self) -> int:
        """Wait for its end; returns the exit code, or minus the number of the signal."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """Let it save and end; after `grace_s` end it."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.wait()
        except TimeoutError:
            logger.warning("learning process %d did not end within %g s", self.pid, grace_s)
            self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self._process.send_signal(number)
