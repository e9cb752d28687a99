"""One process that owns a model: started, asked, and ended; `model_worker` runs in it."""

import contextlib
import itertools
import logging
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from engine.child_process import child_environment, describe_end
from engine.errors import ConfigError, WorkerDied
from engine.worker.answers import error_from_body
from engine.worker.log import WorkerLog
from engine.worker.wire import Message, WireError, receive, send

logger = logging.getLogger(__name__)

WORKER_MODULE = "engine.worker.model_worker"
RING = b"\0"
_END_S = 5.0  # for a process whose socket is closed to end, and for its last words to come


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCommand:
    """How the process of a model is started."""

    bundle: Path
    backend: str = "cpu"
    niceness: int = 0
    module: str = WORKER_MODULE

    def words(self, connection: int, bell: int) -> list[str]:
        """`-P`: the folder that the server was started in must not put modules in the way."""
        return [
            *(sys.executable, "-P", "-X", "faulthandler", "-m", self.module),
            *("--socket", str(connection)),
            *("--bell", str(bell)),
            *("--bundle", str(self.bundle.resolve())),
            *("--backend", self.backend),
            *("--niceness", str(self.niceness)),
        ]


class WorkerProcess:
    """A process with a model, alive or dead.

    It must be started by a thread that lives as long as it is needed (`_die_with_parent` in
    model_worker.py). `ask` is for one thread at a time.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        connection: socket.socket,
        bell: socket.socket,
        log: WorkerLog,
    ) -> None:
        self._process = process
        self._connection = connection
        self._bell = bell
        bell.setblocking(False)
        self._log = log
        self._numbers = itertools.count()
        self._ended = threading.Event()
        self._verdict = ""  # why it was killed
        threading.Thread(target=self._reap, name="worker end", daemon=True).start()

    @classmethod
    def start(cls, command: WorkerCommand) -> "WorkerProcess":
        """Start a process; raises `ConfigError` where the system has no room for one."""
        (ours, theirs), (bell, heard) = socket.socketpair(), socket.socketpair()
        try:
            process = subprocess.Popen(
                command.words(theirs.fileno(), heard.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # the server's own is for what scripts read
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno(), heard.fileno()],
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is for the server, which then drains
            )
        except OSError as error:
            ours.close()
            bell.close()
            raise ConfigError(f"the process for the model cannot be started: {error}") from error
        finally:
            theirs.close()  # else the end of the process would not be the end of the socket
            heard.close()
        assert process.stdout
        log = WorkerLog(process.stdout, f"model process {process.pid}")
        return cls(process, ours, bell, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def hello(self, *, timeout_s: float) -> str:
        """Wait until the model is loaded; returns the identity of its bundle.

        Raises what loading raised, or `WorkerDied`.
        """
        answer = self._receive("loading the model", timeout_s)
        if "error" in answer.body:
            raise error_from_body(answer.body["error"])
        return str(answer.body["model"])

    def ask(self, action: str, request: Message, *, timeout_s: float) -> Message:
        """One question and its answer; raises what the model raised, or `WorkerDied`.

        A process that does not answer in time is killed: nothing else ends a call that hangs.
        """
        number = next(self._numbers)
        body = {**request.body, "action": action, "number": number}
        try:
            try:
                send(self._connection, Message(body, request.arrays), timeout_s=timeout_s)
            except TimeoutError:
                raise self._hung(action, timeout_s) from None
            except OSError as error:
                raise self.died(action) from error
            answer = self._receive(action, timeout_s)
            if answer.body.get("number") != number:
                raise self._broken(action, WireError("it is the answer to something else"))
        except (WorkerDied, WireError):
            raise
        except BaseException:  # an interrupt: question and answer are out of step from here on
            self.kill("its caller was interrupted")
            raise
        if "error" in answer.body:
            raise error_from_body(answer.body["error"])
        return answer

    def hold(self) -> None:
        """Have it answer after the denoiser's call that it is in; from any thread."""
        with contextlib.suppress(OSError):  # it is told already, or gone
            self._bell.send(RING)

    def _receive(self, action: str, timeout_s: float) -> Message:
        try:
            return receive(self._connection, timeout_s=timeout_s)
        except TimeoutError:
            raise self._hung(action, timeout_s) from None
        except (EOFError, OSError) as error:
            raise self.died(action) from error
        except WireError as error:
            raise self._broken(action, error) from error

    def _hung(self, action: str, timeout_s: float) -> WorkerDied:
        self.kill(f"it did not answer within {timeout_s:g} s")
        return self.died(action)

    def _broken(self, action: str, error: WireError) -> WorkerDied:
        self.kill(f"its answer was no message: {error}")
        return self.died(action)

    def died(self, action: str) -> WorkerDied:
        """The error for a call that it left without an answer."""
        if not self._ended.wait(_END_S):
            self.kill("it closed its socket")
            self._ended.wait(_END_S)
        return WorkerDied(f"the model's process ended during {action}: {self.end()}")

    def wait(self) -> None:
        """Wait for its end."""
        self._ended.wait()

    def _reap(self) -> None:
        self._process.wait()
        self._ended.set()

    @property
    def is_sound(self) -> bool:
        """Whether it lives, and question and answer are in step."""
        return not self._verdict and not self._ended.is_set()

    def end(self) -> str:
        """How it ended, in words."""
        code = self._process.returncode
        if self._verdict:
            return f"it was killed because {self._verdict}"
        if code is None:
            return "it does not end"
        if code == -signal.SIGKILL:
            return f"it ended {describe_end(code)}, often the kernel's answer to a lack of memory"
        return f"it ended {describe_end(code)}"

    def last_words(self) -> list[str]:
        """The end of what it wrote to stderr."""
        return self._log.tail(wait_s=_END_S if self._ended.is_set() else 0.0)

    def kill(self, verdict: str) -> None:
        self._verdict = self._verdict or verdict
        self._process.kill()

    def stop(self, *, grace_s: float = 1.0) -> None:
        """Have it end: by itself where it waits for a question, else after `grace_s` by force."""
        with contextlib.suppress(OSError):  # it may be gone
            self._connection.shutdown(socket.SHUT_RDWR)
        if not self._ended.wait(grace_s):
            self.kill(f"it did not end within {grace_s:g} s")
            self._ended.wait(_END_S)

    def close(self) -> None:
        """Give the sockets back; not while another thread is in `ask`."""
        self._connection.close()
        self._bell.close()
