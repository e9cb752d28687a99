"""What is judged: concepts with their labels, and the images that each was learned from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.concepts import Concept, read_concept
from engine.requests import RgbImage
from trainer.evaluation_errors import EvaluationError
from trainer.images import TrainingImages, read_images

GREY = 128  # takes the place of a background behind a mask


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPictures:
    """The images of a concept as levels of RGB, cropped as learning crops them."""

    folder: str
    names: tuple[str, ...]
    pictures: tuple[RgbImage, ...]
    without_background: tuple[RgbImage, ...]  # of those that have a mask, on grey
    skipped: tuple[str, ...]  # "name: reason"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One concept under judgement. Subjects of one label are one point of the figure."""

    label: str
    source: str  # the concept file
    concept: Concept
    class_word: str  # the coarse noun of what it is; "" where unknown
    training: TrainingPictures


def read_subjects(
    files: Sequence[str], folders: Sequence[Path], class_words: Sequence[str], *, size: int
) -> list[Subject]:
    """Concepts from `FILE` or `LABEL=FILE`; one folder for all or one each, class words likewise.

    A concept without a class word has the one it was initialized with, if its file says so.
    Raises `EvaluationError` for counts that do not fit, and the errors of concepts and images.
    """
    _check_count("--images", len(folders), len(files))
    if class_words:
        _check_count("--class-word", len(class_words), len(files))
    labels, paths = _labels(files)
    concepts = [read_concept(path) for path in paths]
    training = {folder: read_training_pictures(folder, size=size) for folder in folders}
    return [
        Subject(
            label=label,
            source=str(path),
            concept=concept,
            class_word=_one_for(place, class_words)
            or concept.metadata.get("initializer_token", "").strip(),
            training=training[folders[place if len(folders) > 1 else 0]],
        )
        for place, (label, path, concept) in enumerate(zip(labels, paths, concepts, strict=True))
    ]


def _one_for(place: int, words: Sequence[str]) -> str:
    if not words:
        return ""
    return words[place if len(words) > 1 else 0].strip()


def _check_count(flag: str, count: int, concepts: int) -> None:
    if count not in (1, concepts):
        raise EvaluationError(
            f"{flag} is given {count} times for {concepts} concepts; give it once for all, or "
            "once for each, in their order"
        )


def _labels(files: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Labels and paths; a label that is not given is the file's name, or its path if two agree."""
    given = [_split(file) for file in files]
    stems = [path.stem for label, path in given if not label]
    labels = [
        label or (path.stem if stems.count(path.stem) == 1 else str(path)) for label, path in given
    ]
    return labels, [path for _, path in given]


def _split(file: str) -> tuple[str, Path]:
    label, equals, path = file.partition("=")
    if not equals or Path(file).exists():
        return "", Path(file)
    if not label.strip() or not path:
        raise EvaluationError(f"{file!r} is neither FILE nor LABEL=FILE")
    return label.strip(), Path(path)


def read_training_pictures(folder: Path, *, size: int) -> TrainingPictures:
    """The images of a folder as squares of `size` pixels; raises `NoUsableImages`.

    Captions are left unread: whatever word they hold, the pictures are judged.
    """
    images = read_images(folder, size=size, placeholder_token=None)
    levels = as_pictures(images)
    return TrainingPictures(
        folder=str(folder),
        names=images.names,
        pictures=tuple(levels),
        without_background=tuple(_without_backgrounds(images, levels)),
        skipped=tuple(f"{file.name}: {file.reason}" for file in images.skipped),
    )


def as_pictures(images: TrainingImages) -> list[RgbImage]:
    """Training images as levels of RGB."""
    return list(((images.pixels + 1) * 127.5).permute(0, 2, 3, 1).round().byte().numpy())


def _without_backgrounds(images: TrainingImages, levels: Sequence[RgbImage]) -> list[RgbImage]:
    if images.masks is None:
        return []
    shares = images.masks.permute(0, 2, 3, 1).double().numpy()
    return [
        np.rint(picture * share + GREY * (1 - share)).astype(np.uint8)
        for name, picture, share in zip(images.names, levels, shares, strict=True)
        if name in images.masked
    ]
