"""The law of the quota: never more than it allows, and never less."""

from typing import Any

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, QueueFull, RateLimited
from engine.security.rate_limits import Quota, RateLimits
from engine.serving.status import PUSHBACK, status_of
from protos.oneword.v1 import server_info_pb2
from tests import security_setup
from tests.security_setup import Secured
from tests.service_harness import details

# Fixtures.
start_secured, secured = security_setup.start_secured, security_setup.secured

INFO = "/oneword.v1.ServerInfoService/GetServerInfo"
REQUEST = server_info_pb2.GetServerInfoRequest()


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def take(limits: RateLimits, tenant: str, quota: Quota) -> float:
    """Make a call that ends at once; returns 0, or when to come back."""
    try:
        with limits.admitted(tenant, quota):
            return 0.0
    except RateLimited as error:
        return error.retry_after_s


rates = st.floats(0.01, 1000.0)
gaps = st.lists(st.floats(0.0, 5.0), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(rate=rates, burst=st.integers(1, 20), gaps=gaps)
def test_no_stretch_of_time_has_more_calls_than_burst_and_rate(
    rate: float, burst: int, gaps: list[float]
) -> None:
    clock, quota = Clock(), Quota(requests_per_second=rate, burst=burst)
    limits = RateLimits(clock)
    admitted: list[float] = []
    for gap in gaps:
        clock.now += gap
        if not take(limits, "acme", quota):
            admitted.append(clock.now)
    for first, start in enumerate(admitted):
        for last in range(first, len(admitted)):
            # A millionth of a call is what adding up floats may cost.
            assert last - first + 1 <= burst + rate * (admitted[last] - start) + 1e-6


@settings(max_examples=60, deadline=None)
@given(rate=rates, burst=st.integers(1, 20), gaps=gaps)
def test_who_waits_as_long_as_told_is_admitted(rate: float, burst: int, gaps: list[float]) -> None:
    clock, quota = Clock(), Quota(requests_per_second=rate, burst=burst)
    limits = RateLimits(clock)
    for gap in gaps:
        clock.now += gap
        if wait_s := take(limits, "acme", quota):
            assert wait_s <= 1.0 / rate + 1e-9
            clock.now += wait_s
            assert take(limits, "acme", quota) == 0.0


def test_a_burst_is_there_after_a_rest_and_no_more_than_that() -> None:
    clock, quota = Clock(), Quota(requests_per_second=2.0, burst=3)
    limits = RateLimits(clock)
    for rest_s, expected in ((0.0, 3), (0.5, 1), (0.4, 0), (1e6, 3)):
        clock.now += rest_s
        count = 0
        while not take(limits, "acme", quota):
            count += 1
        assert count == expected


def test_a_clock_that_goes_back_gives_nothing_and_breaks_nothing() -> None:
    clock, quota = Clock(), Quota(requests_per_second=1.0, burst=1)
    limits = RateLimits(clock)
    assert take(limits, "acme", quota) == 0.0
    clock.now -= 500.0
    assert take(limits, "acme", quota) == pytest.approx(1.0)
    clock.now += 1.0
    assert take(limits, "acme", quota) == 0.0


def test_tenants_do_not_share() -> None:
    clock, quota = Clock(), Quota(requests_per_second=1.0, burst=1, concurrent_rpcs=1)
    limits = RateLimits(clock)
    with limits.admitted("a", quota):
        assert take(limits, "a", quota) > 0.0
        assert take(limits, "b", quota) == 0.0


def test_calls_at_once_are_counted_to_their_end() -> None:
    clock, quota = Clock(), Quota(requests_per_second=100.0, burst=100, concurrent_rpcs=2)
    limits = RateLimits(clock)
    with limits.admitted("a", quota):
        with pytest.raises(ValueError, match="x"), limits.admitted("a", quota):
            raise ValueError("x")
        with limits.admitted("a", quota):
            with pytest.raises(RateLimited, match="2 calls of tenant 'a' are under way"):
                limits.admitted("a", quota).__enter__()
        assert take(limits, "a", quota) == 0.0


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 300), st.floats(0.0, 1.0)), max_size=200))
def test_tenants_at_rest_take_no_memory(steps: list[tuple[int, float]]) -> None:
    """At most those who called within the time that a bucket takes to fill, and twice as many
    calls as it takes to look through them."""
    clock, quota = Clock(), Quota(requests_per_second=10.0, burst=1)
    limits = RateLimits(clock)
    for number, gap in steps:
        clock.now += gap
        take(limits, f"tenant {number}", quota)
    clock.now += 1.0
    for _ in range(len(limits) + 1):
        clock.now += 1.0
        take(limits, "last", quota)
    assert len(limits) == 1


def test_a_long_call_does_not_hide_those_at_rest() -> None:
    clock, quota = Clock(), Quota(requests_per_second=10.0, burst=1)
    limits = RateLimits(clock)
    with limits.admitted("long", quota):
        for number in range(1000):
            clock.now += 1.0
            take(limits, f"tenant {number}", quota)
        assert len(limits) <= 4
    assert take(limits, "other", quota) == 0.0


def test_a_quota_out_of_range_is_refused_by_name() -> None:
    for name, value in (
        ("requests_per_second", 0.0),
        ("requests_per_second", float("nan")),
        ("requests_per_second", float("inf")),
        ("burst", 0),
        ("concurrent_rpcs", -1),
    ):
        with pytest.raises(ConfigError, match=name):
            fields: dict[str, Any] = {name: value}
            Quota(**fields)


@pytest.mark.parametrize("kind", [QueueFull, RateLimited])
def test_a_client_is_told_when_to_come_back(kind: type[QueueFull | RateLimited]) -> None:
    status = status_of(kind("full", retry_after_s=1.2345), "0" * 32)
    assert status.code == StatusCode.RESOURCE_EXHAUSTED
    assert dict(status.trailing_metadata or ())[PUSHBACK] == "1235"


async def test_a_tenant_beyond_its_rate_is_told_when_to_come_back(secured: Secured) -> None:
    secured.credentials.write_text(
        "[defaults]\nrequests_per_second = 0.001\nburst = 2\n[tenants.big]\nburst = 3\n"
    )
    small, big = secured.token("small"), secured.token("big")
    await secured.learn_of()
    for token, burst in ((small, 2), (big, 3)):
        caller = secured.caller(token)
        for _ in range(burst):
            assert await caller.call(INFO, REQUEST)
        error = await caller.refusal(INFO)
        assert error.code() == StatusCode.RESOURCE_EXHAUSTED
        delay = details(error)["google.rpc.RetryInfo"].retry_delay.ToMilliseconds()
        trailers = dict(error.trailing_metadata() or ())
        assert str(delay) == trailers[PUSHBACK]
        assert 0 < delay <= 1_000_000
        assert details(error)["google.rpc.ErrorInfo"].reason == "RATE_LIMITED"
