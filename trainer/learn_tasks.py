"""The words that a command is told to learn: for each its token, its images, and its files."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.concepts import check_placeholder_token
from engine.files import write_atomically
from engine.printing import printable
from trainer.errors import CheckpointError, LearningError

_NOT_IN_FILE_NAMES = re.compile(r"[^\w.-]")
_MAX_FILE_NAME = 40
_KEPT_PATTERN = "step-*.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnTask:
    """One word to learn: its images, and where the files of its run are written."""

    placeholder_token: str
    images: Path
    output: Path
    kept: Path | None = None  # folder for the concepts of its course
    scalars: Path | None = None  # folder for TensorBoard

    @property
    def checkpoint(self) -> Path:
        return self.output.with_name(f"{self.output.name}.checkpoint")

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that files of the run are written to."""
        return tuple(f for f in (self.output.parent, self.kept, self.scalars) if f is not None)

    def preview(self, step: int) -> Path:
        return self.output.with_name(f"{self.output.stem}.step-{step:05d}.png")

    def kept_concept(self, step: int) -> Path:
        assert self.kept is not None
        return self.kept / f"step-{step:05d}.safetensors"

    def check_files(self, *, resume: bool) -> None:
        """Find out now, not after the last step, what cannot be written or would be mixed up."""
        if self.output.is_dir():
            raise LearningError(
                f"--output {self.output} is a folder; name a file, such as x.safetensors"
            )
        for folder in self.folders:
            _check_writable(folder)
        if not resume:
            self._check_not_begun()
        if self.output.exists():
            print(f"{printable(self.output)} exists and will be overwritten", file=sys.stderr)

    def _check_not_begun(self) -> None:
        if self.checkpoint.exists():
            raise CheckpointError(
                f"{self.checkpoint} holds an unfinished run; add --resume to go on with it, or "
                "delete it"
            )
        if self.kept and (found := sorted(self.kept.glob(_KEPT_PATTERN))):
            raise LearningError(
                f"{self.kept} holds the concepts of another run ({found[0].name}); name another "
                "folder for --keep-checkpoints, or delete them"
            )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe := folder / ".oneword-probe", b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise LearningError(f"cannot write to {folder}: {error.strerror}") from error


def tasks_of(arguments: argparse.Namespace) -> list[LearnTask]:
    """What `IMAGES --placeholder-token` or the `--concept`s ask for.

    Raises `LearningError` for neither or both, and for words that could not be told apart.
    """
    if arguments.concept:
        return _several(arguments)
    if arguments.images is None or arguments.placeholder_token is None:
        raise LearningError(
            "nothing to learn: give IMAGES and --placeholder-token for one word, or "
            "--concept '<cat>=FOLDER' for each of several"
        )
    check_placeholder_token(arguments.placeholder_token)
    return [
        LearnTask(
            placeholder_token=arguments.placeholder_token,
            images=arguments.images,
            output=arguments.output,
            kept=arguments.keep_checkpoints,
            scalars=arguments.tensorboard,
        )
    ]


def _several(arguments: argparse.Namespace) -> list[LearnTask]:
    if arguments.images is not None or arguments.placeholder_token is not None:
        raise LearningError(
            "--concept names token and images of each word; leave IMAGES and --placeholder-token "
            "out, or write that word as one more --concept"
        )
    given = [_split(text) for text in arguments.concept]
    _check_different([token for token, _ in given])
    if arguments.output.exists() and not arguments.output.is_dir():
        raise LearningError(
            f"--output {arguments.output} is a file; with --concept name a folder, which gets a "
            "file for each word"
        )
    return [
        LearnTask(
            placeholder_token=token,
            images=folder,
            output=arguments.output / f"{(name := _file_name(token))}.safetensors",
            kept=_inside(arguments.keep_checkpoints, name),
            scalars=_inside(arguments.tensorboard, name),
        )
        for token, folder in given
    ]


def _inside(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _split(text: str) -> tuple[str, Path]:
    token, equals, folder = text.partition("=")
    if not (token and equals and folder):
        raise LearningError(
            f"--concept {text!r} does not say token and images; write '<cat>=FOLDER'"
        )
    check_placeholder_token(token)
    if not Path(folder).is_dir():
        raise LearningError(f"--concept {text!r}: no such folder {folder}")
    return token, Path(folder)


def _check_different(tokens: Sequence[str]) -> None:
    of_file: dict[str, str] = {}
    for token in tokens:
        if (count := tokens.count(token)) > 1:
            raise LearningError(
                f"--concept {token} is given {count} times; each word needs a token of its own "
                "(put all images of one word into one folder)"
            )
        # Some file systems do not tell small letters from capitals.
        other = of_file.setdefault(_file_name(token).casefold(), token)
        if other != token:
            raise LearningError(
                f"--concept {other} and --concept {token} would both be written to "
                f"{_file_name(token)}.safetensors; rename one"
            )


def _file_name(token: str) -> str:
    """Of at most 40 characters, which no file system finds too long."""
    name = token.removeprefix("<").removesuffix(">")
    return _NOT_IN_FILE_NAMES.sub("_", name).strip(".")[:_MAX_FILE_NAME] or "word"
