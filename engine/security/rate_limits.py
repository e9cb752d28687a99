"""How much each tenant may ask for: a token bucket for the rate, and a cap on calls at once."""

import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.errors import ConfigError, RateLimited

# When one of the calls under way may have ended; how long they take is not known.
_RETRY_CONCURRENT_AFTER_S = 1.0
_ROUNDING = 1e-9  # of a token: a caller that waits as long as it was told must get one


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one tenant may ask for, all its callers together."""

    requests_per_second: float = 20.0  # in the long run
    burst: int = 40  # at once, after a rest
    concurrent_rpcs: int = 32

    def __post_init__(self) -> None:
        if not 0.0 < self.requests_per_second < float("inf"):
            raise ConfigError(
                f"requests_per_second must be above 0 and finite, got {self.requests_per_second}"
            )
        for name in ("burst", "concurrent_rpcs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class TokenBucket:
    """Holds up to `burst` tokens and gets `requests_per_second` of them; a call takes one."""

    def __init__(self, quota: Quota, now: float) -> None:
        self._tokens = float(quota.burst)
        self._updated = now

    def take(self, quota: Quota, now: float) -> float:
        """Take a token; returns 0, or the seconds until there is one, and then takes none."""
        self._fill(quota, now)
        if self._tokens >= 1.0 - _ROUNDING:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / quota.requests_per_second

    def is_full(self, quota: Quota, now: float) -> bool:
        """Whether it is as good as a new one."""
        self._fill(quota, now)
        return self._tokens >= quota.burst

    def _fill(self, quota: Quota, now: float) -> None:
        gained = max(0.0, now - self._updated) * quota.requests_per_second
        self._tokens = min(float(quota.burst), self._tokens + gained)
        self._updated = now


@dataclass(slots=True)
class _Usage:
    bucket: TokenBucket
    quota: Quota
    running: int = field(default=0)


class RateLimits:
    """The usage of all tenants; tenants at rest take no memory. For the event loop alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: OrderedDict[str, _Usage] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._usage)

    @contextmanager
    def admitted(self, tenant: str, quota: Quota) -> Generator[None]:
        """One call, from its beginning to its end; raises `RateLimited` for one too many."""
        usage = self._use(tenant, quota)
        self._take(tenant, usage)
        usage.running += 1
        try:
            yield
        finally:
            usage.running -= 1

    def _use(self, tenant: str, quota: Quota) -> _Usage:
        now = self._clock()
        usage = self._usage.get(tenant)
        if usage is None:
            usage = self._usage[tenant] = _Usage(TokenBucket(quota, now), quota)
        usage.quota = quota  # it may have been changed
        self._usage.move_to_end(tenant)
        self._drop_idle(now, keep=tenant)
        return usage

    def _drop_idle(self, now: float, *, keep: str) -> None:
        """Forget up to two of the longest unused: faster than new ones come, one at a time."""
        for _ in range(2):
            tenant, usage = next(iter(self._usage.items()))
            idle = not usage.running and usage.bucket.is_full(usage.quota, now)
            if idle and tenant != keep:
                del self._usage[tenant]
            else:
                self._usage.move_to_end(tenant)  # a long call must not hide those behind it

    def _take(self, tenant: str, usage: _Usage) -> None:
        quota = usage.quota
        if usage.running >= quota.concurrent_rpcs:
            raise RateLimited(
                f"{usage.running} calls of {_named(tenant)} are under way, its limit; wait for one "
                "of them, or ask the operator for more concurrent_rpcs",
                retry_after_s=_RETRY_CONCURRENT_AFTER_S,
            )
        wait_s = usage.bucket.take(quota, self._clock())
        if wait_s > 0.0:
            raise RateLimited(
                f"{_named(tenant)} has used up its {quota.requests_per_second:g} calls a second "
                f"(burst {quota.burst}); try again in {wait_s:.3g} s",
                retry_after_s=wait_s,
            )


def _named(tenant: str) -> str:
    return f"tenant {tenant!r}" if tenant else "callers without credentials"
