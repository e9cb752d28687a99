"""Trainings from a script: the part of both clients that has words learned."""

from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from typing import Any

from engine.client.calls import PAGE_SIZE, Call, Page, Stubs, new_request_id
from engine.client.errors import ServerError
from engine.client.jobs import watch_broke
from engine.client.link import AsyncLink, Link
from engine.errors import InvalidRequest
from engine.training.option_wire import options_to_proto
from protos.oneword.v1 import training_pb2
from protos.oneword.v1.training_pb2 import (
    GetTrainingResponse,
    Training,
    WatchTrainingRequest,
    WatchTrainingResponse,
)

CHUNK_BYTES = 256 << 10
ENDED = (
    training_pb2.TRAINING_STATE_SUCCEEDED,
    training_pb2.TRAINING_STATE_FAILED,
    training_pb2.TRAINING_STATE_CANCELLED,
)


class WatchTrainingStream:
    """A training until it has ended, watched again wherever the server was stopped meanwhile."""

    patient = True

    def __init__(self, training_id: str) -> None:
        self.ended = False
        self.gains = 0
        self._request = WatchTrainingRequest(training_id=training_id)
        self._last: WatchTrainingResponse | None = None

    def method(self, stubs: Stubs) -> Any:
        return stubs.training.WatchTraining

    def request(self) -> WatchTrainingRequest:
        return self._request

    def read(self, response: WatchTrainingResponse) -> Iterable[WatchTrainingResponse]:
        self.ended = response.training.state in ENDED
        if response == self._last:
            return ()
        self._last = response
        self.gains += 1
        return (response,)

    def cut_short(self) -> ServerError | None:
        return watch_broke()


def create_training(
    placeholder_token: str,
    images: Mapping[str, bytes],
    *,
    masks: Mapping[str, bytes] | None = None,
    captions: Mapping[str, str] | None = None,
    overwrite: bool = False,
    request_id: str = "",
    preview_every_steps: int = 0,
    **options: Any,
) -> Call[Training]:
    """An upload with an id, by which it can be repeated; the rest is as in `TrainingClient`."""
    masks, captions = masks or {}, captions or {}
    if strangers := sorted((set(masks) | set(captions)) - set(images)):
        raise InvalidRequest(
            f"masks or captions of no image: {', '.join(strangers)}; name them as their images"
        )
    spec = training_pb2.TrainingSpec(
        placeholder_token=placeholder_token,
        options=options_to_proto(options),
        overwrite=overwrite,
        request_id=request_id or new_request_id(),
        preview_every_steps=preview_every_steps,
    )
    return Call(
        method=lambda stubs: stubs.training.CreateTraining,
        request=lambda: create_requests(spec, images, masks, captions),
        read=lambda reply: reply.training,
    )


def create_requests(
    spec: training_pb2.TrainingSpec,
    images: Mapping[str, bytes],
    masks: Mapping[str, bytes],
    captions: Mapping[str, str],
) -> Iterator[training_pb2.CreateTrainingRequest]:
    """The messages of an upload: the spec, each image with what belongs to it, the end."""
    yield training_pb2.CreateTrainingRequest(spec=spec)
    for name, content in images.items():
        for chunk in _chunks(name, content):
            yield training_pb2.CreateTrainingRequest(image=chunk)
        for chunk in _chunks(name, masks.get(name, b"")):
            yield training_pb2.CreateTrainingRequest(mask=chunk)
        if name in captions:
            text = training_pb2.ImageCaptions(file_name=name, text=captions[name])
            yield training_pb2.CreateTrainingRequest(captions=text)
    end = training_pb2.UploadEnd(num_images=len(images))
    yield training_pb2.CreateTrainingRequest(end=end)


def _chunks(file_name: str, content: bytes) -> Iterator[training_pb2.ImageChunk]:
    for offset in range(0, len(content), CHUNK_BYTES):
        data = content[offset : offset + CHUNK_BYTES]
        yield training_pb2.ImageChunk(file_name=file_name, offset=offset, data=data)


def get_training(training_id: str) -> Call[GetTrainingResponse]:
    message = training_pb2.GetTrainingRequest(training_id=training_id)
    return Call(
        method=lambda stubs: stubs.training.GetTraining,
        request=lambda: message,
        read=lambda reply: reply,
    )


def cancel_training(training_id: str) -> Call[Training]:
    message = training_pb2.CancelTrainingRequest(training_id=training_id)
    return Call(
        method=lambda stubs: stubs.training.CancelTraining,
        request=lambda: message,
        read=lambda reply: reply.training,
    )


def list_trainings(page_token: str) -> Call[Page[Training]]:
    message = training_pb2.ListTrainingsRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call(
        method=lambda stubs: stubs.training.ListTrainings,
        request=lambda: message,
        read=lambda reply: Page(reply.trainings, reply.next_page_token),
    )


def delete_training(training_id: str) -> Call[None]:
    message = training_pb2.DeleteTrainingRequest(training_id=training_id)
    return Call(
        method=lambda stubs: stubs.training.DeleteTraining,
        request=lambda: message,
        read=lambda _reply: None,
        removes=True,
    )


class TrainingClient:
    """The trainings of one server, as `Client.training`. Every method raises `ServerError`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def create(
        self,
        placeholder_token: str,
        images: Mapping[str, bytes],
        *,
        masks: Mapping[str, bytes] | None = None,
        captions: Mapping[str, str] | None = None,
        overwrite: bool = False,
        request_id: str = "",
        preview_every_steps: int = 0,
        **options: Any,
    ) -> Training:
        """Send images (PNG, JPEG or WebP) by name to have a word learned from them.

        `masks` (PNG) and `captions` (one sentence a line) are by the name of their image, `options`
        the fields of `LearnOptions`, choices by their words. With the `request_id` of an earlier
        call: the same training. Raises `InvalidRequest` for what cannot be sent.
        """
        call = create_training(
            placeholder_token,
            images,
            masks=masks,
            captions=captions,
            overwrite=overwrite,
            request_id=request_id,
            preview_every_steps=preview_every_steps,
            **options,
        )
        return self._link.call(call)

    def watch(
        self, training_id: str, *, timeout_s: float | None = None
    ) -> Generator[WatchTrainingResponse]:
        """A training now and whenever it has changed, until it has ended.

        Goes on after a server was away for at most `RetryPolicy.max_outage_s`. Without `timeout_s`
        there is no deadline.
        """
        return self._link.stream(WatchTrainingStream(training_id), timeout_s)

    def get(self, training_id: str) -> GetTrainingResponse:
        """Describe a training; with the concept file, once there is one."""
        return self._link.call(get_training(training_id))

    def cancel(self, training_id: str) -> Training:
        """Ask a training to stop."""
        return self._link.call(cancel_training(training_id))

    def list(self) -> Generator[Training]:
        """All trainings, the latest first, fetched page by page."""
        return self._link.pages(list_trainings)

    def delete(self, training_id: str) -> None:
        """Forget a training that has ended."""
        self._link.call(delete_training(training_id))


class AsyncTrainingClient:
    """The same under asyncio, as `AsyncClient.training`."""

    def __init__(self, link: AsyncLink) -> None:
        self._link = link

    async def create(
        self,
        placeholder_token: str,
        images: Mapping[str, bytes],
        *,
        masks: Mapping[str, bytes] | None = None,
        captions: Mapping[str, str] | None = None,
        overwrite: bool = False,
        request_id: str = "",
        preview_every_steps: int = 0,
        **options: Any,
    ) -> Training:
        call = create_training(
            placeholder_token,
            images,
            masks=masks,
            captions=captions,
            overwrite=overwrite,
            request_id=request_id,
            preview_every_steps=preview_every_steps,
            **options,
        )
        return await self._link.call(call)

    def watch(
        self, training_id: str, *, timeout_s: float | None = None
    ) -> AsyncGenerator[WatchTrainingResponse]:
        return self._link.stream(WatchTrainingStream(training_id), timeout_s)

    async def get(self, training_id: str) -> GetTrainingResponse:
        return await self._link.call(get_training(training_id))

    async def cancel(self, training_id: str) -> Training:
        return await self._link.call(cancel_training(training_id))

    def list(self) -> AsyncGenerator[Training]:
        return self._link.pages(list_trainings)

    async def delete(self, training_id: str) -> None:
        await self._link.call(delete_training(training_id))
