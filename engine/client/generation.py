"""Streams of images: what is told of them, once, however often the connection breaks.

A stream that broke is asked for again under the same `request_id`. The server then tells again
what it has told, and here it is left out: nobody gets an image twice, or from two requests.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from grpc import StatusCode

from engine.client.calls import Stubs
from engine.client.errors import ServerError, error_of_failure
from protos.oneword.v1.generation_pb2 import (
    Accepted,
    GenerateBatchRequest,
    GenerateBatchResponse,
    GenerateRequest,
    GenerateResponse,
    ImageResult,
    Progress,
    Summary,
)

Event: TypeAlias = Accepted | Progress | ImageResult | Summary
MAX_BATCH_REQUESTS = 256  # as servers have it, see RequestLimits
MAX_BATCH_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The images of one request, in the order of their seeds, and what the server says of them."""

    request_id: str
    images: list[bytes]  # files in the format asked for
    summary: Summary


class Told:
    """What was told of one request."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.ended = False
        self.num_images = 0
        self._accepted: Accepted | None = None
        self._steps: dict[int, int] = {}
        self._images: set[int] = set()

    def news(self, response: GenerateResponse) -> Event | None:
        """What was not told before; raises `ServerError` for what does not belong together."""
        match response.WhichOneof("event"):
            case "accepted":
                return self._accept(response.accepted)
            case "progress":
                progress = response.progress
                if progress.step <= self._steps.get(progress.image_index, 0):
                    return None
                self._steps[progress.image_index] = progress.step
                return progress
            case "image":
                if response.image.image_index in self._images:
                    return None
                self._images.add(response.image.image_index)
                self.num_images += 1
                return response.image
            case "summary":
                return self._conclude(response.summary)
            case None:  # an event that a later version has added
                return None

    def _accept(self, accepted: Accepted) -> Accepted | None:
        first, self._accepted = self._accepted or accepted, accepted
        if first is accepted:
            return accepted
        if first.seed != accepted.seed:
            raise ServerError(
                StatusCode.ABORTED,
                f"the connection broke, and the server began request {self.request.request_id} "
                "anew with another seed; ask again, best with a seed of your own",
            )
        return None

    def _conclude(self, summary: Summary) -> Summary:
        if self.num_images != len(summary.seeds):
            raise ServerError(
                StatusCode.INTERNAL,
                f"the server ended request {self.request.request_id} after {self.num_images} of "
                f"{len(summary.seeds)} images",
            )
        self.ended = True
        return summary


class Collected:
    """The events of one request, becoming its result."""

    def __init__(self) -> None:
        self._request_id = ""
        self._images: dict[int, bytes] = {}

    def add(self, event: Event) -> GenerationResult | None:
        match event:
            case Accepted():
                self._request_id = event.request_id
            case ImageResult():
                self._images[event.image_index] = event.image
            case Summary():
                images = [self._images[index] for index in sorted(self._images)]
                return GenerationResult(request_id=self._request_id, images=images, summary=event)
            case Progress():
                pass
        return None


class GenerateStream:
    """The stream of one request."""

    patient = False

    def __init__(self, request: GenerateRequest) -> None:
        self._told = Told(request)

    @property
    def ended(self) -> bool:
        return self._told.ended

    @property
    def gains(self) -> int:
        return self._told.num_images

    def method(self, stubs: Stubs) -> Any:
        return stubs.generation.Generate

    def request(self) -> GenerateRequest:
        return self._told.request

    def read(self, response: GenerateResponse) -> Iterable[Event]:
        event = self._told.news(response)
        return () if event is None else (event,)

    def cut_short(self) -> ServerError | None:
        return ServerError(StatusCode.INTERNAL, "the server ended the stream without a summary")


Outcome: TypeAlias = GenerationResult | ServerError
OnResult: TypeAlias = Callable[[int, GenerationResult | ServerError], None]


class BatchStream:
    """The streams of many requests, as few calls; each request ends with a result or an error."""

    patient = False

    def __init__(self, requests: Sequence[GenerateRequest]) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self._told = [Told(request) for request in requests]
        self._collected = [Collected() for _ in requests]
        self._sent: list[int] = []  # which of the requests the call at hand has
        self._failed: dict[int, ServerError] = {}  # that may succeed in another call

    @property
    def ended(self) -> bool:
        return len(self.outcomes) == len(self._told)

    @property
    def gains(self) -> int:
        return len(self.outcomes) + sum(told.num_images for told in self._told)

    def method(self, stubs: Stubs) -> Any:
        return stubs.generation.GenerateBatch

    def request(self) -> GenerateBatchRequest:
        """The first of those that have not ended, as many as a call may have."""
        self._sent, num_bytes = [], 0
        for index, told in enumerate(self._told):
            if index in self.outcomes:
                continue
            num_bytes += told.request.ByteSize()
            if self._sent and num_bytes > MAX_BATCH_BYTES:
                break
            self._sent.append(index)
            if len(self._sent) == MAX_BATCH_REQUESTS:
                break
        self._failed = {}
        return GenerateBatchRequest(requests=[self._told[index].request for index in self._sent])

    def read(self, response: GenerateBatchResponse) -> Iterable[tuple[int, Outcome]]:
        if response.index >= len(self._sent):
            raise ServerError(
                StatusCode.INTERNAL,
                f"the server answered request {response.index} of {len(self._sent)}",
            )
        index = self._sent[response.index]
        outcome = None if index in self.outcomes else self._outcome(index, response)
        if outcome is None:
            return ()
        self.outcomes[index] = outcome
        return ((index, outcome),)

    def _outcome(self, index: int, response: GenerateBatchResponse) -> Outcome | None:
        if response.HasField("failure"):
            error = error_of_failure(response.failure)
            if not error.transient:
                return error
            self._failed[index] = error
            return None
        try:
            event = self._told[index].news(response.response)
        except ServerError as error:
            return error
        return None if event is None else self._collected[index].add(event)

    def cut_short(self) -> ServerError | None:
        """None where all that was sent has ended, and what is left goes into another call."""
        if all(index in self.outcomes for index in self._sent):
            return None
        if not self._failed:
            return ServerError(StatusCode.INTERNAL, "the server ended the stream too early")
        return max(self._failed.values(), key=lambda error: error.retry_after_s or 0.0)

    def give_up(self, error: ServerError) -> Iterable[tuple[int, Outcome]]:
        """What has not ended has failed: with its own error, or that of the call."""
        given_up: list[tuple[int, Outcome]] = [
            (index, self._failed.get(index, error))
            for index in range(len(self._told))
            if index not in self.outcomes
        ]
        self.outcomes.update(given_up)
        return given_up
