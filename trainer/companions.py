"""Files of a folder that say something of the image of the same name: masks and captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.masks import masked_stem


@dataclass(frozen=True, slots=True)
class Companions:
    """The masks and captions of a folder, by the names of their images without suffix."""

    masks: dict[str, Path]
    captions: dict[str, Path]

    @classmethod
    def among(cls, paths: Sequence[Path]) -> "Companions":
        masks: dict[str, Path] = {}
        for path in paths:
            if (stem := masked_stem(path.name)) is not None:
                masks.setdefault(stem, path)
        texts = {path.stem: path for path in paths if path.suffix.lower() == ".txt"}
        pictured = {path.stem for path in paths if path not in texts.values()}
        return cls(masks, {stem: path for stem, path in texts.items() if stem in pictured})

    def holds(self, path: Path) -> bool:
        return masked_stem(path.name) is not None or path in self.captions.values()

    def idle(self, path: Path, paths: Sequence[Path]) -> str | None:
        """Why a mask is of no use; None if it is used, and for captions."""
        stem = masked_stem(path.name)
        if stem is None:
            return None
        if not any(other.stem == stem and not self.holds(other) for other in paths):
            return f"no image is named {stem!r}, whose mask it would be"
        if self.masks[stem] != path:
            return f"{stem!r} has the mask {self.masks[stem].name} already"
        return None
