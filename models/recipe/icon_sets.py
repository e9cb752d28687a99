"""Vector emoji from npm: one JSON of SVG bodies a set, and the names of Unicode CLDR."""

import io
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from models.recipe.archives import unpack
from models.recipe.errors import RecipeError
from models.recipe.objects import Style
from trainer.messages import first_line

_NAMES = ("unicode-emoji-json", "0.9.0")
# What single sets call an object that the others call otherwise.
_OTHER_SLUGS = {
    "dog-face": ("dog",),
    "sun": ("sun-with-face",),
    "snowman-without-snow": ("snowman",),
}
_FETCH_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class IconSet:
    """One emoji set as its package has it."""

    content: dict[str, Any]

    def has(self, slug: str) -> bool:
        """Whether the set draws this object."""
        return self._name(slug) is not None

    def render(self, slug: str, size: int) -> Image.Image:
        """The object as RGBA in a square of `size` pixels.

        Errors:
            RecipeError: resvg is not installed, or the set does not draw the object.
        """
        try:
            import resvg_py  # only a machine that draws icons needs it
        except ModuleNotFoundError:
            raise RecipeError("resvg-py is missing; pip install resvg-py") from None
        name = self._name(slug)
        if name is None:
            raise RecipeError(f"the icon set {self.content.get('prefix')!r} does not draw {slug!r}")
        icon = self.content["icons"][name]
        width, height = (icon.get(key, self.content.get(key, 16)) for key in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
        with Image.open(io.BytesIO(bytes(png))) as image:
            return image.convert("RGBA")

    def _name(self, slug: str) -> str | None:
        for name in (slug, *_OTHER_SLUGS.get(slug, ())):
            name = self.content.get("aliases", {}).get(name, {}).get("parent", name)
            if name in self.content["icons"]:
                return name
        return None


def read_icon_set(style: Style, work_dir: Path) -> IconSet:
    """The set of a style; fetched from npm into `work_dir`, once.

    Errors:
        RecipeError: npm is missing, cannot reach the registry, or what it fetched is damaged.
    """
    return IconSet(_read_json(_fetched(style.package, style.version, work_dir) / "icons.json"))


def read_groups(work_dir: Path) -> dict[str, str]:
    """CLDR slug to group of every emoji, in Unicode's order.

    Errors:
        RecipeError: as `read_icon_set`.
    """
    names = _read_json(_fetched(*_NAMES, work_dir) / "data-by-emoji.json")
    return {entry["slug"].replace("_", "-"): entry["group"] for entry in names.values()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        folder = path.parent.parent
        raise RecipeError(
            f"cannot read {path} ({first_line(error)}); delete {folder}, it is fetched again"
        ) from error


def _fetched(package: str, version: str, work_dir: Path) -> Path:
    """The folder of an npm package, fetched once."""
    folder = work_dir / f"{package.replace('/', '-').removeprefix('@')}-{version}"
    if folder.is_dir():
        return folder / "package"
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work_dir) as staging:
            _fetch(f"{package}@{version}", Path(staging))
            (archive,) = Path(staging).glob("*.tgz")
            unpacked = Path(staging) / "unpacked"
            with tarfile.open(archive) as tar:
                unpack(tar, unpacked)
            os.replace(unpacked, folder)
    except (OSError, tarfile.TarError) as error:
        raise RecipeError(f"cannot unpack {package}@{version}: {first_line(error)}") from error
    return folder / "package"


def _fetch(package: str, folder: Path) -> None:
    command = ["npm", "pack", "--silent", package, "--pack-destination", str(folder)]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S
        )
    except FileNotFoundError:
        raise RecipeError(
            "npm was not found and there is no icon pack yet; install Node.js to fetch the icons, "
            "or put the icons.zip of another machine in the work folder"
        ) from None
    except subprocess.TimeoutExpired:
        raise RecipeError(f"npm did not fetch {package} within {_FETCH_TIMEOUT_S} s") from None
    except subprocess.CalledProcessError as error:
        reason = first_line(error.stderr) if error.stderr.strip() else "it gave no reason"
        raise RecipeError(f"npm could not fetch {package}: {reason}") from None
