"""The process that owns the graphs: it keeps the images in flight by number and advances them.

Started by `engine/worker/process.py`, which speaks with it over an inherited socket, one question
and one answer at a time. A question for steps may be for several, of which it makes as many as it
can until the server rings a bell: somebody has come or gone, and the next step is another one.

It ends when the socket does, that is, when the server is gone, however that came; signals meant for
the server (Ctrl-C, a service manager's SIGTERM to the whole group) are not for it, for the server
drains before it closes the socket.
"""

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from engine.backends.opening import open_model
from engine.batching.model import Span
from engine.bundle import Bundle
from engine.errors import InvalidRequest, NumericalError, ProviderUnavailable
from engine.pipeline import ImageInFlight, ImageModel
from engine.sessions import share_threads
from engine.worker.answers import error_to_body, identity_of
from engine.worker.task_wire import task_from_message
from engine.worker.wire import Array, Message, WireError, receive, send

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_OOM_SCORE = "500"  # of 1000
_MOST_RINGS = 1 << 16

# Makes the model of a bundle; tests put one in that fails in chosen ways.
Load = Callable[[Bundle, str], ImageModel]


class Worker:
    """The images in flight of this process, and what can be asked about them."""

    def __init__(self, model: ImageModel, is_rung: Callable[[], bool]) -> None:
        """`is_rung` tells whether the server has rung since it was asked last."""
        self._model = model
        self._is_rung = is_rung
        self._images: dict[int, ImageInFlight] = {}
        self._actions: dict[str, Callable[[Message], Message]] = {
            "begin": self._begin,
            "step": self._step,
            "decode": self._decode,
            "preview": self._preview,
            "release": self._release,
            "count": self._count,
        }

    def answer(self, request: Message) -> Message:
        """Do what is asked; whatever goes wrong is an answer too."""
        try:
            self._forget(request.body.get("forgotten", ()))
            action = self._actions.get(request.body.get("action", ""))
            if action is None:
                raise WireError(f"unknown action in {list(request.body)}")
            return action(request)
        except Exception as error:
            if not isinstance(error, InvalidRequest | NumericalError):
                logger.exception("a request to the model failed")
            return Message({"error": error_to_body(error)})

    def _begin(self, request: Message) -> Message:
        images = self._model.begin_task(task_from_message(request))
        self._images |= zip(request.body["ids"], images, strict=True)
        (shape_key,) = {image.shape_key for image in images}
        return Message({"shape_key": shape_key, "row_cost": self._model.row_cost(images[0])})

    def _step(self, request: Message) -> Message:
        images = [self._find(image_id) for image_id in request.body["ids"]]
        if not images:
            raise WireError("a step of no images")
        calls = list[Span]()
        while not calls or (len(calls) < request.body["at_most"] and not self._is_rung()):
            started = time.monotonic()
            self._model.step(images)
            calls.append((started, time.monotonic()))
        return Message({"calls": calls})

    def _decode(self, request: Message) -> Message:
        ids = request.body["ids"]
        images = [self._find(image_id) for image_id in ids]
        self._forget(ids)  # decoded once, whatever comes of it
        results = self._model.decode(images)
        faults = [error_to_body(r) if isinstance(r, NumericalError) else None for r in results]
        pictures = [r for r in results if not isinstance(r, NumericalError)]
        return Message({"faults": faults}, pictures)

    def _preview(self, request: Message) -> Message:
        picture = self._model.preview(self._find(request.body["id"]))
        pictures: list[Array] = [] if picture is None else [picture]
        return Message({}, pictures)

    def _release(self, request: Message) -> Message:
        self._forget(request.body["ids"])
        return Message({})

    def _count(self, request: Message) -> Message:
        return Message({"images": len(self._images)})

    def _find(self, image_id: int) -> ImageInFlight:
        if image_id not in self._images:
            raise WireError(f"there is no image {image_id} in flight")
        return self._images[image_id]

    def _forget(self, ids: Sequence[int]) -> None:
        for image_id in ids:
            self._images.pop(image_id, None)


def serve(
    connection: socket.socket, bell: socket.socket, bundle: Path, backend: str, load: Load
) -> None:
    """Load a bundle, say how that went, then answer until the other side is gone."""
    try:
        opened = Bundle.open(bundle)
        worker = Worker(load(opened, backend), partial(_is_rung, bell))
    except Exception as error:
        with contextlib.suppress(ConnectionError):  # who started this found out for himself
            send(connection, Message({"error": error_to_body(error)}))
        return
    send(connection, Message({"model": identity_of(opened.manifest)}))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = receive(connection)
            answer = worker.answer(request)
            # The number shows the other side that this is the answer to what it asked last.
            answer.body["number"] = request.body.get("number")
            _is_rung(bell)  # until now: with this answer the server decides anew
            send(connection, answer)


def _is_rung(bell: socket.socket) -> bool:
    """Whether the server has rung since the last time that this was asked."""
    try:
        return bool(bell.recv(_MOST_RINGS, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def main(load: Load = open_model) -> None:
    parser = argparse.ArgumentParser(prog="engine.worker.model_worker", allow_abbrev=False)
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the socket")
    parser.add_argument("--bell", type=int, required=True, help="descriptor of the bell's socket")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--niceness", type=int, required=True)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(arguments.niceness)
    _die_with_parent()
    _die_before_parent()
    with contextlib.suppress(ProviderUnavailable):  # told with the bundle, in the words of its load
        share_threads()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with (
        socket.socket(fileno=arguments.socket) as connection,
        socket.socket(fileno=arguments.bell) as bell,
    ):
        serve(connection, bell, arguments.bundle, arguments.backend, load)


def _die_with_parent() -> None:
    """Be killed with the server's process, also in the middle of a call (Linux).

    The kernel means the thread that started this process: it must live as long as the server does.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_before_parent() -> None:
    """When memory runs out, be what the kernel kills: this process can be started again."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_OOM_SCORE)


if __name__ == "__main__":
    main()
