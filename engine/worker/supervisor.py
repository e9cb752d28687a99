"""A process with a model that is always there: started, watched, and started again when it dies.

One thread starts every process and lives as long as this does; it waits for the end of each, so a
death is known at once, also where nobody asks anything. Whoever is in a call when the process dies
gets `WorkerDied` from the broken socket, and may wait for the next process with `wait_ready`.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from engine.errors import BundleError, ConfigError, EngineError, WorkerDied
from engine.worker.process import WorkerCommand, WorkerProcess
from engine.worker.wire import Message

logger = logging.getLogger(__name__)

# Told whether the model serves, and if not, why; in order, from a thread of the supervisor.
OnState = Callable[[bool, str], None]
_GENEROSITY = 50.0  # times what such work usually takes
_START_GENEROSITY = 10.0  # times what the last start took
_END_S = 5.0  # for a process that is told to end
MAX_NICENESS = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """How patient the server is with the process of its model."""

    worker_timeout_s: float = 120.0  # a call that takes longer hangs, unless such calls always do
    # Until a bundle is verified and loaded; a restart gets ten times what the last start took, if
    # that is less, but never less than `worker_timeout_s`.
    start_timeout_s: float = 600.0
    restart_delay_s: float = 0.1  # before the first restart; doubled at each that follows
    max_restart_delay_s: float = 10.0  # at most so much
    settled_s: float = 30.0  # after so long in service, a death is a first one again
    # Of the process, 0 to 19: the higher, the sooner the server's own threads get a core that the
    # model computes on, and the less it gets beside other busy programs.
    niceness: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.niceness <= MAX_NICENESS:
            raise ConfigError(f"niceness must be 0 to {MAX_NICENESS}, got {self.niceness}")
        for setting in fields(self):
            if setting.name != "niceness" and not getattr(self, setting.name) > 0.0:
                raise ConfigError(
                    f"{setting.name} must be more than 0 s, got {getattr(self, setting.name)}"
                )


@dataclass(slots=True)
class Patience:
    """How long an answer may take: 50 times what such work usually takes, or the least if longer.

    A large picture on a slow machine is not a hung process.
    """

    least_s: float
    _usual_s: dict[str, float] = field(default_factory=dict[str, float])  # for work of size 1

    def limit_s(self, action: str, size: float) -> float:
        return max(self.least_s, _GENEROSITY * self._usual_s.get(action, 0.0) * size)

    def learn(self, action: str, size: float, elapsed_s: float) -> None:
        usual_s = self._usual_s.get(action, elapsed_s / size)
        self._usual_s[action] = 0.9 * usual_s + 0.1 * elapsed_s / size


class WorkerSupervisor:
    """Owns one process at a time; `start` it, `close` it."""

    def __init__(self, command: WorkerCommand, config: WorkerConfig) -> None:
        self._command = command
        self._config = config
        self._patience = Patience(config.worker_timeout_s)
        self._asking = threading.Lock()
        self._changed = threading.Condition()
        self._worker: WorkerProcess | None = None  # the one that serves
        self._newest: WorkerProcess | None = None  # the one that serves, loads, or has died
        self._epoch = 0  # processes that have served
        self._identity = ""
        self._started = False  # whether the first process has served
        self._first_error: Exception | None = None  # or why not
        self._closing = False
        self._delay_s = config.restart_delay_s
        self._start_limit_s = config.start_timeout_s
        self._state = (False, "the model is being loaded")
        self._telling = threading.Lock()
        self._on_state: OnState | None = None
        self._thread = threading.Thread(target=self._run, name="worker supervisor", daemon=True)

    # What owners call

    def launch(self) -> None:
        """Start the first process; `start` waits for it."""
        self._thread.start()

    def start(self) -> str:
        """Wait until the first process serves; returns the identity of its bundle.

        Raises what loading raised: a bundle that is broken now is not tried again and again.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._started or self._first_error or self._closing)
        if self._first_error:
            self._thread.join()
            raise self._first_error
        if not self._started:
            raise WorkerDied("the server is shutting down")
        return self._identity

    def close(self) -> None:
        """End the process; calls that wait for it fail. Idempotent."""
        with self._changed:
            self._closing = True
            worker, serving = self._newest, self._worker
            self._worker = None
            self._changed.notify_all()
        if worker:
            worker.stop(grace_s=_END_S if worker is serving else 0.0)
        if self._thread.ident:
            self._thread.join()

    def watch(self, on_state: OnState | None) -> None:
        """Tell of the state now and of every change from now on; None: tell nobody."""
        with self._telling:
            self._on_state = on_state
            if on_state:
                on_state(*self._state)

    @property
    def state(self) -> tuple[bool, str]:
        """Whether it serves, and if not, why."""
        return self._state

    @property
    def pid(self) -> int | None:
        """Of the process that serves."""
        worker = self._worker
        return worker.pid if worker else None

    # What users call

    @property
    def epoch(self) -> int:
        """The number of the process that serves or served last; what it held dies with it."""
        return self._epoch

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until a process serves; False if none does within `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._worker or self._closing, timeout_s)
            return self._worker is not None

    def ask(
        self, action: str, request: Message, *, size: float = 1.0, epoch: int | None = None
    ) -> Message:
        """One question to the process that serves; `size` is how much work it is.

        With `epoch`, to that process or none. Raises `WorkerDied`, or what the model raised.
        """
        with self._asking:
            worker = self._worker
            if worker is None:
                raise WorkerDied("the model's process is being started again; try again later")
            if epoch is not None and epoch != self._epoch:
                raise WorkerDied("the process that had this image has ended; begin it again")
            started = time.monotonic()
            timeout_s = self._patience.limit_s(action, size)
            try:
                answer = worker.ask(action, request, timeout_s=timeout_s)
            finally:
                if not worker.is_sound:
                    self._withdraw(worker)
            self._patience.learn(action, size, time.monotonic() - started)
            return answer

    def hold(self) -> None:
        """Tell the process to answer after the denoiser's call that it is in, if it is in one."""
        if worker := self._worker:
            worker.hold()

    def _withdraw(self, worker: WorkerProcess) -> None:
        """From now on `wait_ready` means the next process, even before this one's end is seen."""
        with self._changed:
            if self._worker is worker:
                self._worker = None

    # The life of the processes, in the supervisor's thread

    def _run(self) -> None:
        while not self._closing:
            worker = self._start_one()
            if self._first_error:
                return
            if worker:
                self._see_through(worker)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, self._delay_s)
            self._delay_s = min(2.0 * self._delay_s, self._config.max_restart_delay_s)
        self._tell(False, "the server is shutting down")

    def _start_one(self) -> WorkerProcess | None:
        """A process that serves, or None where it could not be started."""
        worker = None
        try:
            worker = WorkerProcess.start(self._command)
            with self._changed:
                self._newest = worker
                if self._closing:
                    raise WorkerDied("the server is shutting down")
            started = time.monotonic()
            identity = worker.hello(timeout_s=self._start_limit_s)
            self._check_identity(identity)
            self._allow_start(_START_GENEROSITY * (time.monotonic() - started))
        except Exception as error:
            if worker:
                worker.stop()
                worker.close()
            self._could_not_start(error, worker)
            self._allow_start(2.0 * self._start_limit_s)  # perhaps it only takes longer now
            return None
        with self._changed:
            self._worker, self._identity = worker, identity
            self._epoch += 1
        logger.info("the model's process %d serves", worker.pid)
        self._tell(True, "")
        with self._changed:
            self._started = True
            self._changed.notify_all()
        return worker

    def _allow_start(self, limit_s: float) -> None:
        """How long the next start may take, within what is configured."""
        most_s = self._config.start_timeout_s
        self._start_limit_s = min(max(limit_s, self._config.worker_timeout_s), most_s)

    def _check_identity(self, identity: str) -> None:
        if self._identity and identity != self._identity:
            raise BundleError(
                "the bundle was changed while it was in service; put it back, or start the server "
                "anew to serve what is there now"
            )

    def _could_not_start(self, error: Exception, worker: WorkerProcess | None) -> None:
        if isinstance(error, WorkerDied) and worker:
            error = WorkerDied(_crash_report("could not load the model", worker))
        with self._changed:
            if not self._started:
                self._first_error = error
                self._changed.notify_all()
                return
        if not self._closing:
            known = isinstance(error, EngineError)
            logger.error("the model's process does not start: %s", error, exc_info=not known)
            self._tell(False, f"the model's process does not start: {error}")

    def _see_through(self, worker: WorkerProcess) -> None:
        """Wait for the end of a process that serves, and tell of it."""
        served_since = time.monotonic()
        worker.wait()
        self._withdraw(worker)
        if time.monotonic() - served_since >= self._config.settled_s:
            self._delay_s = self._config.restart_delay_s
        if not self._closing:
            report = _crash_report("died", worker)
            logger.error("%s; another is started in %g s", report, self._delay_s)
            self._tell(False, report)
        with self._asking:  # whoever asks it has seen the end of the socket
            worker.close()

    def _tell(self, serving: bool, reason: str) -> None:
        with self._telling:
            self._state = (serving, reason)
            if self._on_state:
                try:
                    self._on_state(serving, reason)
                except Exception:
                    logger.exception("a listener to the model's state failed")


def _crash_report(what: str, worker: WorkerProcess) -> str:
    words = worker.last_words()
    said = f"; it last said: {' | '.join(words[-5:])}" if words else ""
    return f"the model's process {worker.pid} {what}: {worker.end()}{said}"
