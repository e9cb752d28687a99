"""Requests that keep a server busy while something else is measured."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import grpc

from benchmarks.serving.server_process import RunningServer
from protos.oneword.v1.generation_pb2 import GenerateImagesRequest, GenerateRequest
from protos.oneword.v1.server_info_pb2 import GetServerInfoRequest

FIRST_SEED = 1_000_000  # of these requests; those that are measured have lower ones
REFUSED_PAUSE_S = 0.002
POLL_S = 0.02


@contextmanager
def busy(server: RunningServer, count: int, *, num_inference_steps: int) -> Generator[None]:
    """`count` requests of one image at any time; each that ends is followed by another.

    They are calls with one answer, so that they cost this process nothing while they wait. At the
    end they are cancelled, and the server has nothing more to do.
    """
    filler = _Filler(server, count, num_inference_steps)
    try:
        filler.wait_until_there()
        yield
    finally:
        filler.stop()


class _Filler:
    def __init__(self, server: RunningServer, count: int, num_inference_steps: int) -> None:
        self._server, self._count, self._steps = server, count, num_inference_steps
        self._stopping = threading.Event()
        self._calls: dict[int, Any] = {}
        self._threads = [
            threading.Thread(target=self._fill, args=(place,), daemon=True)
            for place in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_there(self) -> None:
        self._wait_for(lambda num_images: num_images >= self._count)

    def _wait_for(self, is_there: Callable[[int], bool]) -> None:
        while True:
            load = self._server.info.GetServerInfo(GetServerInfoRequest()).load
            if is_there(load.images_in_flight + load.images_queued):
                return
            time.sleep(POLL_S)

    def stop(self) -> None:
        self._stopping.set()
        for call in list(self._calls.values()):
            call.cancel()
        for thread in self._threads:
            thread.join()
        self._wait_for(lambda num_images: not num_images)

    def _fill(self, place: int) -> None:
        seed = FIRST_SEED + place
        while not self._stopping.is_set():
            request = GenerateRequest(
                prompt="a photo of a dog", seed=seed, num_inference_steps=self._steps
            )
            call = self._server.generation.GenerateImages.future(
                GenerateImagesRequest(request=request)
            )
            self._calls[place] = call
            if self._stopping.is_set():  # it may have looked before this call was there
                call.cancel()
            try:
                call.result()
            except grpc.FutureCancelledError:
                return
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:  # pyright: ignore
                    raise
                time.sleep(REFUSED_PAUSE_S)
            seed += self._count
