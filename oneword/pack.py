"""`oneword pack`: a bundle and its words as one folder, or one file, for a device."""

import argparse
from pathlib import Path

from engine.concepts import Concept
from engine.dialects.readers import read_concepts
from engine.printing import printable
from engine.security.signing import key_id, read_private_key
from oneword.pack_requirements import runtime_requirements
from oneword.packing import PackReport, pack_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to pack, and where it goes."""
    parser.description = (
        "Pack a bundle for a device without network and PyTorch: graphs, plans, words, a float16 "
        "embedding table and the versions of the packages that it needs (docs/pack.md)."
    )
    parser.add_argument("bundle", type=Path, help="folder by build_engines.py")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR_OR_FILE",
        help="the folder to make; one file where it ends in .tar or .zip. It must not be there yet",
    )
    parser.add_argument(
        "--concept",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a word to pack, of any tool (docs/concepts.md); requests name it; repeatable",
    )
    parser.add_argument(
        "--plans",
        default="all",
        metavar="NAME[,NAME]",
        help="compiled plans to pack, by the names of their folders in plans/; all (the default) "
        "or none",
    )
    parser.add_argument(
        "--sign-key",
        type=Path,
        metavar="FILE",
        help="sign what is packed with this private key (`oneword keys create` makes one)",
    )
    parser.add_argument(
        "--trusted-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="pack only a bundle signed with the key of this public one; repeatable",
    )


def run(arguments: argparse.Namespace) -> int:
    """Pack, and say what is in it."""
    key = None if arguments.sign_key is None else read_private_key(arguments.sign_key)
    concepts: list[Concept] = []
    for path in arguments.concept:
        concepts += read_concepts(path)
    report = pack_bundle(
        arguments.bundle,
        arguments.output,
        requirements=lambda plans: runtime_requirements(signed=key is not None, plans=plans),
        concepts=concepts,
        plans=_plan_names(arguments.plans),
        key=key,
        trusted_keys=arguments.trusted_key,
    )
    print(describe(report))
    print(f"  signed by key {key_id(key.public_key())}" if key is not None else "  not signed")
    return 0


def describe(report: PackReport) -> str:
    """What was packed: words, plans, and what the rounding did."""
    words = ", ".join(printable(word.placeholder_token) for word in report.concepts)
    lines = [
        f"{printable(report.path)}: packed, {report.num_bytes / 1e6:.1f} MB of files",
        f"  words: {words or 'none'}",
        f"  plans: {', '.join(map(printable, report.plans)) or 'none'}",
    ]
    lines += [
        f"  {name} in float16: off by at most {error:.1e} of its largest value"
        for name, error in report.rounding.items()
    ]
    return "\n".join(lines)


def _plan_names(text: str) -> list[str] | None:
    if text == "all":
        return None
    return [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
