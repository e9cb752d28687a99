"""Trainings from a script: the part of the blocking client that has words learned."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from engine.errors import InvalidRequest
from engine.training_option_wire import options_to_proto
from protos.oneword.v1 import training_pb2, training_pb2_grpc

CHUNK_BYTES = 256 << 10
_PAGE_SIZE = 500


class TrainingClient:
    """The trainings of one server, as `Client.training`. Every method raises `ServerError`."""

    def __init__(
        self,
        stub: training_pb2_grpc.TrainingServiceStub,
        timeout_s: float | None,
        errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`errors` turns what gRPC raises into `ServerError`."""
        self._stub = stub
        self._timeout_s = timeout_s
        self._errors = errors

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
    ) -> training_pb2.Training:
        """Send images (PNG, JPEG or WebP) by name to have a word learned from them.

        `masks` (PNG) and `captions` (one sentence a line) are by the name of their image, `options`
        the fields of `LearnOptions`, choices by their words. With a `request_id` the call can be
        repeated. Raises `InvalidRequest` for what cannot be sent.
        """
        if strangers := sorted((set(masks or ()) | set(captions or ())) - set(images)):
            raise InvalidRequest(
                f"masks or captions of no image: {', '.join(strangers)}; name them as their images"
            )
        spec = training_pb2.TrainingSpec(
            placeholder_token=placeholder_token,
            options=options_to_proto(options),
            overwrite=overwrite,
            request_id=request_id,
            preview_every_steps=preview_every_steps,
        )
        with self._errors():
            requests = create_requests(spec, images, masks or {}, captions or {})
            return self._stub.CreateTraining(requests, timeout=self._timeout_s).training

    def watch(self, training_id: str) -> Generator[training_pb2.WatchTrainingResponse]:
        """A training now and whenever it has changed, until it has ended; without a deadline."""
        request = training_pb2.WatchTrainingRequest(training_id=training_id)
        with self._errors():
            call = self._stub.WatchTraining(request)
            try:
                yield from call
            finally:
                call.cancel()  # no effect on a call that has ended

    def get(self, training_id: str) -> training_pb2.GetTrainingResponse:
        """Describe a training; with the concept file, once there is one."""
        request = training_pb2.GetTrainingRequest(training_id=training_id)
        with self._errors():
            return self._stub.GetTraining(request, timeout=self._timeout_s)

    def cancel(self, training_id: str) -> training_pb2.Training:
        """Ask a training to stop."""
        request = training_pb2.CancelTrainingRequest(training_id=training_id)
        with self._errors():
            return self._stub.CancelTraining(request, timeout=self._timeout_s).training

    def list(self) -> Iterator[training_pb2.Training]:
        """All trainings, the latest first, fetched page by page."""
        request = training_pb2.ListTrainingsRequest(page_size=_PAGE_SIZE)
        while True:
            with self._errors():
                page = self._stub.ListTrainings(request, timeout=self._timeout_s)
            yield from page.trainings
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def delete(self, training_id: str) -> None:
        """Forget a training that has ended."""
        request = training_pb2.DeleteTrainingRequest(training_id=training_id)
        with self._errors():
            self._stub.DeleteTraining(request, timeout=self._timeout_s)


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
