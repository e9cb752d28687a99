"""The images of one training on their way in: checked, hashed and written as they come.

They are received in a folder of their own, which becomes the training when all of it is there, and
goes away otherwise.
"""

import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

from engine.errors import InvalidRequest, quoted
from engine.files import sync_folder
from engine.images import check_image_file
from engine.training_folder import TrainingFolder, UploadedImage, storage_errors
from engine.training_spec import MAX_FILE_NAME_CHARACTERS, TrainingLimits

MAX_IMAGE_PIXELS = 64 * 1024 * 1024  # below what Pillow calls a decompression bomb


class Upload:
    """Receives the images of one training, from one thread; `discard` may come from another."""

    def __init__(self, path: Path, limits: TrainingLimits) -> None:
        """Begin in a folder that does not exist yet; its name is the training's id."""
        self.folder = TrainingFolder(path)
        self._limits = limits
        self._images: list[UploadedImage] = []
        self._total_bytes = 0
        self._incoming: _IncomingFile | None = None
        self._lock = threading.Lock()  # a caller can be gone while a part is being written
        self._discarded = False
        with storage_errors():
            self.folder.images.mkdir(parents=True)

    @property
    def training_id(self) -> str:
        return self.folder.path.name

    def add(self, file_name: str, offset: int, data: bytes) -> None:
        """Take the next part of an image; raises `InvalidRequest` or `StoreError`."""
        if not data:
            raise InvalidRequest("a chunk without data; leave it out", field="image.data")
        with self._lock:
            if not self._discarded:
                self._add(file_name, offset, data)

    def _add(self, file_name: str, offset: int, data: bytes) -> None:
        if self._incoming is None or file_name != self._incoming.file_name:
            self._begin(file_name)
        assert self._incoming is not None
        self._check_offset(self._incoming, offset)
        self._check_sizes(self._incoming, len(data))
        self._total_bytes += len(data)
        with storage_errors():
            self._incoming.write(data)

    def finish(self, num_images: int) -> None:
        """End the upload, of so many images as the caller says; they are on disk then."""
        with self._lock:
            if not self._discarded:
                self._end_file()
        if not self._images:
            raise InvalidRequest(
                "no image was sent; send chunks of 3 to 5 images after the spec", field="image"
            )
        if num_images != len(self._images):
            raise InvalidRequest(
                f"{num_images} images were announced at the end, {len(self._images)} have come; "
                "send all of them again",
                field="end.num_images",
            )
        with storage_errors():
            sync_folder(self.folder.images)

    @property
    def images(self) -> tuple[UploadedImage, ...]:
        """Those that have come whole."""
        return tuple(self._images)

    def discard(self) -> None:
        """Leave nothing behind."""
        with self._lock:
            self._discarded = True
            if self._incoming is not None:
                self._incoming.file.close()
            shutil.rmtree(self.folder.path, ignore_errors=True)

    def _begin(self, file_name: str) -> None:
        self._end_file()
        if not 1 <= len(file_name) <= MAX_FILE_NAME_CHARACTERS:
            raise InvalidRequest(
                f"file_name must have 1 to {MAX_FILE_NAME_CHARACTERS} characters, "
                f"got {len(file_name)}",
                field="image.file_name",
            )
        if any(image.file_name == file_name for image in self._images):
            raise InvalidRequest(
                f"two images are called {quoted(file_name)}, or its chunks do not follow each "
                "other; send one file after another, each under its own name",
                field="image.file_name",
            )
        if len(self._images) == self._limits.max_images:
            raise InvalidRequest(
                f"more than {self._limits.max_images} images, the limit of this server; send the "
                "best ones, 3 to 5 are usual",
                field="image",
            )
        with storage_errors():
            self._incoming = _IncomingFile(file_name, self.folder.path / "incoming")

    def _check_offset(self, incoming: "_IncomingFile", offset: int) -> None:
        if offset != incoming.num_bytes:
            raise InvalidRequest(
                f"{quoted(incoming.file_name)} goes on at offset {offset}, but {incoming.num_bytes}"
                " bytes of it have come; send its chunks in order, without gaps",
                field="image.offset",
            )

    def _check_sizes(self, incoming: "_IncomingFile", more: int) -> None:
        for what, num_bytes, limit in (
            (quoted(incoming.file_name), incoming.num_bytes, self._limits.max_image_bytes),
            ("the upload", self._total_bytes, self._limits.max_upload_bytes),
        ):
            if num_bytes + more > limit:
                raise InvalidRequest(
                    f"{what} is larger than {limit} bytes, the limit of this server; scale the "
                    "images down, a model learns from some 512 to 1024 pixels",
                    field="image.data",
                )

    def _end_file(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        with storage_errors():
            sha256 = incoming.close()
        try:
            check_image_file(incoming.path, max_pixels=MAX_IMAGE_PIXELS)
        except InvalidRequest as error:
            raise InvalidRequest(
                f"{quoted(incoming.file_name)}: {error}", field="image.data"
            ) from error
        with storage_errors():
            name = TrainingFolder.image_name(len(self._images), sha256)
            os.replace(incoming.path, self.folder.images / name)
        self._images.append(UploadedImage(file_name=incoming.file_name, sha256=sha256))


class _IncomingFile:
    """A file of which a part has come."""

    def __init__(self, file_name: str, path: Path) -> None:
        self.file_name = file_name
        self.path = path
        self.num_bytes = 0
        self.file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)

    def close(self) -> str:
        """Put it on disk; returns the SHA-256 of its content."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return self._digest.hexdigest()
