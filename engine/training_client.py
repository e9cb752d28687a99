"""Trainings from a script: the part of the blocking client that has words learned."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

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
        overwrite: bool = False,
        request_id: str = "",
        preview_every_steps: int = 0,
        **options: Any,
    ) -> training_pb2.Training:
        """Send images (PNG, JPEG or WebP) by name to have a word learned from them.

        `options` are the fields of `LearnOptions`. With a `request_id` the call can be repeated.
        """
        spec = training_pb2.TrainingSpec(
            placeholder_token=placeholder_token,
            options=training_pb2.LearnOptions(**options),
            overwrite=overwrite,
            request_id=request_id,
            preview_every_steps=preview_every_steps,
        )
        with self._errors():
            requests = create_requests(spec, images.items())
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
    spec: training_pb2.TrainingSpec, images: Iterable[tuple[str, bytes]]
) -> Iterator[training_pb2.CreateTrainingRequest]:
    """The messages of an upload: the spec, then each image in chunks, then the end."""
    yield training_pb2.CreateTrainingRequest(spec=spec)
    num_images = 0
    for file_name, content in images:
        num_images += 1
        for offset in range(0, len(content), CHUNK_BYTES):
            chunk = training_pb2.ImageChunk(
                file_name=file_name, offset=offset, data=content[offset : offset + CHUNK_BYTES]
            )
            yield training_pb2.CreateTrainingRequest(image=chunk)
    end = training_pb2.UploadEnd(num_images=num_images)
    yield training_pb2.CreateTrainingRequest(end=end)
