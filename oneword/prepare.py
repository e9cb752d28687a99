"""`oneword prepare`: graphs as this processor wants them, so that starts are quick."""

import argparse
import sys
from pathlib import Path

from engine.bundle import Bundle
from engine.errors import ConfigError
from engine.prepared_graphs import usual_graphs
from engine.preparing import Prepared, prepare_bundle
from engine.printing import printable
from engine.security.bundle_signatures import check_bundle

KEEP_GB = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the graphs of a bundle as ONNX Runtime optimizes and packs them for this processor. "
        "From then on the backend `cpu` maps them, in a fraction of the time that it takes to load "
        "the bundle's own, and processes share their memory (docs/cpu-backend.md). They are kept "
        "in the user's cache folder ($XDG_CACHE_HOME or ~/.cache), and made by whoever is to use "
        "them: the user that the server runs as."
    )
    parser.add_argument("bundle", type=Path, help="folder by build_engines.py")
    parser.add_argument(
        "--keep-gb",
        type=float,
        default=KEEP_GB,
        metavar="GB",
        help="then remove what was used least recently, of any bundle, until the rest has at most "
        "this size; what was prepared now stays (default: %(default)g)",
    )
    parser.add_argument(
        "--trusted-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="prepare only a bundle signed with the key of this public one; repeatable",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prepare each graph, and say how much quicker it loads."""
    if not arguments.keep_gb >= 0.0:
        raise ConfigError(f"--keep-gb must be at least 0, got {arguments.keep_gb:g}")
    graphs = usual_graphs()
    if graphs is None:
        raise ConfigError("this user has no home folder; set XDG_CACHE_HOME to a folder to keep")
    if arguments.trusted_key:
        check_bundle(arguments.bundle, arguments.trusted_key)
    bundle, total = Bundle.open(arguments.bundle), 0
    for one in prepare_bundle(
        bundle, graphs, keep_bytes=int(1e9 * arguments.keep_gb), on_start=_say_what_comes
    ):
        print(_line(one), flush=True)
        total += one.nbytes
    print(f"{total / 1e6:,.0f} MB in {printable(graphs.folder)}")
    return 0


def _say_what_comes(component: str) -> None:
    if sys.stderr.isatty():
        print(f"{component} ...", end="\r", file=sys.stderr, flush=True)


def _line(one: Prepared) -> str:
    line = f"{one.component}: {one.nbytes / 1e6:,.1f} MB, "
    if one.was_there:
        return line + "prepared already"
    return line + f"loads in {one.prepared_load_s:.2f} s (prepared in {one.load_s:.1f} s)"
