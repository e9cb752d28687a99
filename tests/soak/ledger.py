"""What everybody was told, and what nobody should have been."""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode

# A bug of ours, whoever asks and whatever for.
NEVER = (StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.DATA_LOSS)
# The client library of whoever was told no while it still wrote.
LOCAL = "Internal error from Core"
SETTLED_S = 5.0  # after the server serves again, answers of the fault may still be on their way
MOST_VIOLATIONS = 50


@dataclass
class Ledger:
    """Answers by who got them, times of well-behaved calls, and violations."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    violations: list[str] = field(default_factory=list[str])
    given_up: int = 0  # calls that were reset in the breath that they were made in
    latencies_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=10_000))
    _secrets: dict[bytes, str] = field(default_factory=dict[bytes, str])
    _pictures: dict[bytes, str] = field(default_factory=dict[bytes, str])
    _faults: int = 0
    _fault_ended: float = float("-inf")
    _floods: int = 0
    _flood_ended: float = float("-inf")

    def violation(self, text: str) -> None:
        if text not in self.violations and len(self.violations) < MOST_VIOLATIONS:
            self.violations.append(text)

    def keep_secret(self, tenant: str, text: str) -> None:
        """A word that no other tenant may ever receive, however images write it."""
        for encoding in ("utf-8", "utf-16-be"):
            self._secrets[text.encode(encoding)] = tenant

    def keep_picture(self, tenant: str, content: bytes) -> None:
        self._pictures[hashlib.sha256(content).digest()] = tenant

    @property
    def secrets(self) -> list[bytes]:
        return list(self._secrets)

    def received(self, tenant: str, what: str, content: bytes) -> None:
        """Bytes that came to a tenant, or to nobody in particular ("")."""
        for secret, owner in self._secrets.items():
            if owner != tenant and secret in content:
                self.violation(f"{tenant or 'a stranger'} received a word of {owner}'s by {what}")

    def received_picture(self, tenant: str, what: str, content: bytes) -> None:
        owner = self._pictures.get(hashlib.sha256(content).digest(), tenant)
        if owner != tenant:
            self.violation(f"{tenant} received an image of {owner}'s by {what}")

    def answered(self, who: str, code: StatusCode, what: str) -> None:
        self.counts[who, code.name] += 1
        if code in NEVER:
            self.violation(f"{what} of {who} ended with {code.name}")

    def refused(self, tenant: str, who: str, what: str, error: grpc.aio.AioRpcError) -> None:
        """Note an error as its receiver saw it, texts and details included."""
        told = f"{error.details()}".encode() + _details_of(error)
        self.received(tenant, what, told)
        if error.details() == LOCAL:
            return
        self.answered(who, error.code(), f"{what} ({(error.details() or '')[:200]})")

    def resident_refused(self, who: str, what: str, error: grpc.aio.AioRpcError) -> None:
        """An error of a well-behaved call: only some are in order, and only sometimes."""
        self.refused(who, who, what, error)
        code = error.code()
        if code is StatusCode.RESOURCE_EXHAUSTED and says_when(error):
            return
        if code is StatusCode.UNAVAILABLE and self.in_fault:
            return
        if self.dropped_in_flood(code, error.details() or ""):
            return
        if code not in NEVER:
            fault = "around" if self.in_fault else "without"
            text = (error.details() or "")[:200]
            self.violation(f"{what} of {who} ended with {code.name} {fault} a fault: {text}")

    @contextmanager
    def flood(self) -> Generator[None]:
        """While gRPC's own queue of calls overflows, it cancels some of anybody's unseen."""
        self._floods += 1
        try:
            yield
        finally:
            self._floods -= 1
            self._flood_ended = time.monotonic()

    def dropped_in_flood(self, code: StatusCode, details: str) -> bool:
        """Whether it was gRPC that gave a call up (docs/attacks.md, what is not covered)."""
        flooded = self._floods > 0 or time.monotonic() - self._flood_ended < SETTLED_S
        return flooded and code is StatusCode.CANCELLED and details == "CANCELLED"

    @contextmanager
    def fault(self) -> Generator[None]:
        """While the model's process is away, calls may be told so."""
        self._faults += 1
        try:
            yield
        finally:
            self._faults -= 1
            self._fault_ended = time.monotonic()

    @property
    def in_fault(self) -> bool:
        return self._faults > 0 or time.monotonic() - self._fault_ended < SETTLED_S


def _details_of(error: grpc.aio.AioRpcError) -> bytes:
    return b"".join(
        value if isinstance(value, bytes) else value.encode()
        for _, value in error.trailing_metadata() or ()
    )


def says_when(error: grpc.aio.AioRpcError) -> bool:
    """Whether a refusal says when to come back."""
    retry: Message = error_details_pb2.RetryInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return any(detail.Unpack(retry) for detail in Status.FromString(value).details)
    return False
