"""The images of one training on their way in: checked, hashed and written as they come.

They are received in a folder of their own, which becomes the training when all of it is there, and
goes away otherwise. An image may be followed by its mask and its captions.
"""

import hashlib
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from engine.errors import InvalidRequest, quoted
from engine.files import sync_path
from engine.images import check_image_file
from engine.training.folder import Part, TrainingFolder, UploadedImage, storage_errors
from engine.training.spec import (
    MAX_CAPTIONS_BYTES,
    MAX_FILE_NAME_CHARACTERS,
    MAX_IMAGE_PIXELS,
    TrainingLimits,
)

_FORMATS: dict[Part, tuple[str, ...]] = {"image": ("PNG", "JPEG", "WEBP"), "mask": ("PNG",)}
_DATA_FIELDS: dict[Part, str] = {
    "image": "image.data",
    "mask": "mask.data",
    "captions": "captions.text",
}


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

    def add(self, part: Part, file_name: str, offset: int, data: bytes) -> None:
        """Take the next bytes of an image, or of what belongs to an image that has come.

        Raises `InvalidRequest` or `StoreError`.
        """
        if not data:
            raise InvalidRequest("a chunk without data; leave it out", field=_DATA_FIELDS[part])
        with self._lock:
            if not self._discarded:
                self._add(part, file_name, offset, data)

    def _add(self, part: Part, file_name: str, offset: int, data: bytes) -> None:
        incoming = self._incoming
        if incoming is None or (part, file_name) != (incoming.part, incoming.file_name):
            incoming = self._begin(part, file_name)
        if offset != incoming.num_bytes:
            raise InvalidRequest(
                f"{incoming.label} goes on at offset {offset}, but {incoming.num_bytes} bytes of "
                "it have come; send its chunks in order, without gaps",
                field=f"{part}.offset",
            )
        self._check_sizes(incoming, len(data))
        self._total_bytes += len(data)
        with storage_errors():
            incoming.write(data)

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
            sync_path(self.folder.images)

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

    def _begin(self, part: Part, file_name: str) -> "_IncomingFile":
        self._end_file()
        if part == "image":
            self._check_new_image(file_name)
        elif getattr(self._images[self._index_of(file_name, part)], f"{part}_sha256"):
            raise InvalidRequest(
                f"{part} of {quoted(file_name)} have come already; send them once, without gaps",
                field=f"{part}.file_name",
            )
        with storage_errors():
            self._incoming = _IncomingFile(part, file_name, self.folder.path / "incoming")
        return self._incoming

    def _check_new_image(self, file_name: str) -> None:
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

    def _index_of(self, file_name: str, part: Part) -> int:
        """The place of the image that a mask or captions belong to."""
        for index, image in enumerate(self._images):
            if image.file_name == file_name:
                return index
        raise InvalidRequest(
            f"{part} of {quoted(file_name)}, but no image of that name has come; send an image, "
            "then its mask and captions under the same file_name",
            field=f"{part}.file_name",
        )

    def _check_sizes(self, incoming: "_IncomingFile", more: int) -> None:
        is_text = incoming.part == "captions"
        of_file = MAX_CAPTIONS_BYTES if is_text else self._limits.max_image_bytes
        for what, num_bytes, limit in (
            (incoming.label, incoming.num_bytes, of_file),
            ("the upload", self._total_bytes, self._limits.max_upload_bytes),
        ):
            if num_bytes + more > limit:
                remedy = (
                    "shorten them"
                    if is_text
                    else "scale the images down, a model learns from some 512 to 1024 pixels"
                )
                raise InvalidRequest(
                    f"{what} is larger than {limit} bytes, the limit of this server; {remedy}",
                    field=_DATA_FIELDS[incoming.part],
                )

    def _end_file(self) -> None:
        """Check a file that has come whole, and give it its place."""
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        with storage_errors():
            sha256 = incoming.close()
        self._check_content(incoming)
        part, file_name = incoming.part, incoming.file_name
        if part == "image":
            self._images.append(UploadedImage(file_name=file_name, sha256=sha256))
        index = self._index_of(file_name, part)
        if part != "image":
            self._images[index] = replace(self._images[index], **{f"{part}_sha256": sha256})
        with storage_errors():
            path = self.folder.part(index, self._images[index].sha256, part)
            os.replace(incoming.path, path)

    def _check_content(self, incoming: "_IncomingFile") -> None:
        """Refuse what is no picture by its beginning; captions are for the trainer to judge."""
        if incoming.part not in _FORMATS:
            return
        try:
            formats = _FORMATS[incoming.part]
            check_image_file(incoming.path, max_pixels=MAX_IMAGE_PIXELS, formats=formats)
        except InvalidRequest as error:
            field = _DATA_FIELDS[incoming.part]
            raise InvalidRequest(f"{incoming.label}: {error}", field=field) from error


class _IncomingFile:
    """A file of which a part has come."""

    def __init__(self, part: Part, file_name: str, path: Path) -> None:
        self.part: Part = part
        self.file_name = file_name  # of the image that it is, or belongs to
        self.path = path
        self.num_bytes = 0
        self.file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()

    @property
    def label(self) -> str:
        """What to call it in messages."""
        name = quoted(self.file_name)
        return name if self.part == "image" else f"{self.part} of {name}"

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
