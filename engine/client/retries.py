"""When a call that failed is made again: one policy for blocking and asyncio clients alike.

Nothing here sleeps, sends or reads a clock of its own.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine.client.errors import ServerError
from engine.errors import ConfigError

_MOST_DOUBLINGS = 64  # beyond, a power may be more than a float holds


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How a client repeats calls. `max_attempts=1`: never."""

    max_attempts: int = 5  # of a call; those after which images came do not count
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    backoff_multiplier: float = 2.0
    max_retry_after_s: float = 60.0  # longer than a server may have a call wait; beyond it fails
    max_outage_s: float = 300.0  # for which watching a job or a training survives without a server
    # As gRPC's retryThrottling: a failure takes one token, a success gives `budget_ratio` back, and
    # with half of them or less nothing is repeated.
    budget: float = 20.0
    budget_ratio: float = 0.1
    # Repeat also where nobody listens and nobody ever did: a server that is being started, not a
    # wrong address.
    wait_for_server: bool = False

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigError(f"max_attempts must be at least 1, got {self.max_attempts}")
        for name in ("initial_backoff_s", "max_backoff_s", "backoff_multiplier", "budget"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("max_retry_after_s", "max_outage_s", "budget_ratio"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    def backoff_s(self, failures: int, chance: float) -> float:
        """Exponential with full jitter; `chance` is uniform in [0, 1)."""
        doublings = min(failures - 1, _MOST_DOUBLINGS)
        longest = self.initial_backoff_s * self.backoff_multiplier**doublings
        return chance * min(self.max_backoff_s, longest)


class ServerRecord:
    """What a client knows of its server: whether it was ever there, and how often it failed."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self.reached = False
        self._tokens = policy.budget
        self._lock = threading.Lock()

    @property
    def allows_retries(self) -> bool:
        return self._tokens > self.policy.budget / 2

    def succeeded(self) -> None:
        with self._lock:
            self.reached = True
            self._tokens = min(self.policy.budget, self._tokens + self.policy.budget_ratio)

    def failed(self, error: ServerError) -> None:
        """A server that says when to come back steers its load itself: that takes no token."""
        with self._lock:
            self.reached |= error.fate == "answered"
            if error.transient and error.retry_after_s is None:
                self._tokens = max(0.0, self._tokens - 1.0)


class Attempts:
    """The attempts of one call: how long each may take, and when the next one begins."""

    def __init__(
        self,
        record: ServerRecord,
        *,
        timeout_s: float | None,
        patient: bool,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        """All attempts together have `timeout_s`. A `patient` call outlasts a server's absence."""
        self.timeout_s = timeout_s
        self.answer_lost = False  # an attempt may have been carried out all the same
        self._record, self._policy = record, record.policy
        self._patient = patient
        self._clock, self._random = clock, random
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._last_answer = clock()
        self._begun = 0
        self._failures = 0  # since something was gained
        self._gains = 0
        self._last: ServerError | None = None

    def begin(self) -> float | None:
        """The time that is left for the attempt that begins now; raises where there is none."""
        left = None if self._deadline is None else self._deadline - self._clock()
        if left is not None and left <= 0.0 and self._last is not None:
            raise self._last
        self._begun += 1
        return left

    def answered(self, gains: int) -> None:
        """The server has sent something; `gains` counts what a repeated call need not send."""
        self._last_answer = self._clock()
        self._record.reached = True
        if gains > self._gains:
            self._gains, self._failures = gains, 0

    def succeeded(self) -> None:
        self._record.succeeded()

    def failed(self, error: ServerError) -> float:
        """Seconds until the next attempt; raises the error where there is none."""
        self._failures += 1
        self._last = error
        self.answer_lost |= error.fate == "unknown"
        error.attempts = self._begun
        self._record.failed(error)
        delay = self._delay_s(error)
        too_late = self._deadline is not None and self._clock() + delay >= self._deadline
        if too_late or not self._may_retry(error):
            raise error
        return delay

    def _may_retry(self, error: ServerError) -> bool:
        policy, steered = self._policy, error.retry_after_s is not None
        if not error.transient or (error.retry_after_s or 0.0) > policy.max_retry_after_s:
            return False
        if error.fate == "unsent" and not self._record.reached and not policy.wait_for_server:
            return False
        if self._patient:
            return self._clock() - self._last_answer <= policy.max_outage_s
        return self._failures < policy.max_attempts and (steered or self._record.allows_retries)

    def _delay_s(self, error: ServerError) -> float:
        """Not before the server wants it, and then not all clients at once."""
        if error.retry_after_s is None and not self._record.allows_retries:
            return self._policy.backoff_s(_MOST_DOUBLINGS, self._random())
        waits = error.retry_after_s or 0.0
        return waits + self._policy.backoff_s(self._failures, self._random())
