"""Write the graphs of a bundle as this processor wants them (engine/prepared_graphs.py).

Each is held against the graph that it was made of on the same random inputs before it takes its
place; it is the same arithmetic, so the same numbers come out.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.backends.device import shapes_of
from engine.bundle import Bundle, ComponentSpec
from engine.errors import BundleError, StorageFull
from engine.prepared_graphs import GRAPH, NOTE, PreparedGraphs, write_note
from engine.sessions import Array, OnnxSession
from engine.staging import remove_abandoned, staged_folder

# Of the largest output: a hundred roundings of float32. On the machines at hand it was 0.
MAX_RELATIVE_ERROR = 1e-5
# Packed weights take this much more room than a graph's own (1.28 was seen); and some to spare.
_GROWTH = 1.5

OnStart = Callable[[str], None]  # is told the component that is prepared next


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One graph that is ready now."""

    component: str
    place: Path
    nbytes: int
    was_there: bool
    load_s: float = 0.0  # of the graph as it is in the bundle, writing the prepared one included
    prepared_load_s: float = 0.0


def prepare_bundle(
    bundle: Bundle,
    graphs: PreparedGraphs,
    *,
    keep_bytes: int,
    on_start: OnStart = lambda component: None,
) -> Iterator[Prepared]:
    """Prepare each graph that is not ready, then make room of what was used least recently.

    What is kept may have `keep_bytes` in all. Raises `BundleError` where a prepared graph computes
    something else, and `StorageFull`; nothing half-written is left.
    """
    for place in graphs.folder.glob(".*.building-*"):  # of a process that was killed
        remove_abandoned(graphs.folder / place.name[1:].split(".building-")[0])
    used: set[Path] = set()
    for component in bundle.manifest.components:
        on_start(component)
        place = graphs.place(bundle.sources(component))
        if graphs.find(bundle.sources(component)):
            done = Prepared(component=component, place=place, nbytes=_size(place), was_there=True)
        else:
            done = _prepare(bundle, component, place)
        used.add(place)
        yield done
    _make_room(graphs.folder, keep_bytes, used)


def _prepare(bundle: Bundle, component: str, place: Path) -> Prepared:
    spec = bundle.manifest.components[component]
    _check_disk(bundle.path, spec, place)
    feeds = random_feeds(bundle, spec)
    with staged_folder(place) as staging:
        started = time.perf_counter()
        session = OnnxSession(bundle.path / spec.file, prepared=staging / GRAPH)
        load_s = time.perf_counter() - started
        expected = session.run(feeds)
        del session  # of a large model both would not fit
        started = time.perf_counter()
        ready = OnnxSession(staging / GRAPH, is_prepared=True)
        prepared_load_s = time.perf_counter() - started
        _compare(component, ready.run(feeds), expected)
        del ready
        write_note(staging)
    return Prepared(
        component=component,
        place=place,
        nbytes=_size(place),
        was_there=False,
        load_s=load_s,
        prepared_load_s=prepared_load_s,
    )


def random_feeds(bundle: Bundle, spec: ComponentSpec) -> dict[str, Array]:
    """Inputs for two rows of half the model's own size."""
    latents, random = bundle.manifest.latents, np.random.default_rng(0)
    side = max(latents.default_size // 2 // latents.size_multiple, 1) * latents.size_multiple
    if any(tensor.name != "images" for tensor in spec.inputs):
        side //= latents.scale_factor
    lengths = {"rows": 2, "batch": 1, "height": side, "width": side}
    lengths["tokens"] = bundle.manifest.text.max_tokens
    return {
        name: random.standard_normal(shape) if shape[1:] else np.ones(shape)
        for name, shape in shapes_of(spec.inputs, lengths).items()
    }


def _compare(component: str, found: dict[str, Array], expected: dict[str, Array]) -> None:
    for name, values in expected.items():
        scale = np.abs(values.astype(np.float64)).max()
        error = np.abs(found[name].astype(np.float64) - values).max()
        if not error <= MAX_RELATIVE_ERROR * scale:  # neither where it is NaN
            raise BundleError(
                f"{component} computes something else once it is prepared: {name} is off by "
                f"{error / scale:.1e} of its range, at most {MAX_RELATIVE_ERROR:.0e} is rounding; "
                "it was not kept. Please report it with the output of `oneword doctor`"
            )


def _check_disk(bundle: Path, spec: ComponentSpec, place: Path) -> None:
    files = [bundle / spec.file, bundle / f"{spec.file}.data"]
    needed = int(_GROWTH * sum(file.stat().st_size for file in files if file.is_file()))
    there = next(folder for folder in place.parents if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StorageFull(
            f"{spec.file} takes up to {needed / 1e6:,.0f} MB once it is prepared, {there} has "
            f"{free / 1e6:,.0f} MB free; make room, or set XDG_CACHE_HOME to another place"
        )


def _make_room(folder: Path, keep_bytes: int, used: set[Path]) -> None:
    """Remove what was used least recently, but nothing of `used`."""
    notes = sorted(folder.glob(f"*/{NOTE}"), key=lambda note: note.stat().st_mtime)
    total = sum(_size(note.parent) for note in notes)
    for place in (note.parent for note in notes if note.parent not in used):
        if total <= keep_bytes:
            return
        total -= _size(place)
        (place / NOTE).unlink()  # first: without it nobody takes the rest for whole
        shutil.rmtree(place)


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir())
