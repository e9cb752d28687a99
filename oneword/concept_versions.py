"""`oneword concepts`, the part about versions: list them, give them aliases, bring them back."""

import argparse
from collections.abc import Callable
from datetime import UTC
from typing import Any

from engine.printing import printable
from oneword.connection import add_server_action, connect
from protos.oneword.v1 import concepts_pb2


def add_actions(actions: Any) -> None:
    """The subcommands, beside those of `oneword.concepts`."""
    versions = actions.add_parser("versions", help="list the versions of a stored concept")
    _add(versions, _versions)
    alias = actions.add_parser("alias", help="let NAME@ALIAS stand for a version, or move it there")
    _add(alias, _alias)
    alias.add_argument("alias", metavar="ALIAS", help="a-z, 0-9, '.', '_', '-'; such as stable")
    alias.add_argument("--version", type=int, metavar="N", help="default: the latest")
    add_etag(alias)
    unalias = actions.add_parser("unalias", help="take an alias from a stored concept")
    _add(unalias, _unalias)
    unalias.add_argument("alias", metavar="ALIAS")
    add_etag(unalias)
    undelete = actions.add_parser("undelete", help="bring a deleted concept back")
    _add(undelete, _undelete)


def add_etag(parser: argparse.ArgumentParser) -> None:
    """For commands that change a name which others may change too."""
    parser.add_argument(
        "--etag", default="", help="do it only if the name still has this etag, which `show` prints"
    )


def time_of(concept: concepts_pb2.Concept) -> str:
    return concept.import_time.ToDatetime(UTC).astimezone().isoformat(" ", "seconds")


def _add(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None]) -> None:
    parser.add_argument("placeholder_token", metavar="NAME")
    add_server_action(parser, action)


def _versions(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        for concept in client.versions(arguments.placeholder_token):
            aliases = ", ".join(map(printable, concept.aliases))
            line = (
                f"{concept.version:>6} {printable(concept.concept_id[:12])} "
                f"{concept.num_vectors:>3} x {concept.dim:<5} {time_of(concept)} {aliases}"
            )
            print(line.rstrip())


def _alias(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        concept = client.set_alias(
            arguments.placeholder_token,
            arguments.alias,
            version=arguments.version,
            etag=arguments.etag,
        )
    name = printable(f"{concept.placeholder_token}@{arguments.alias}")
    print(f"{name} is version {concept.version}, {printable(concept.concept_id[:12])}")


def _unalias(arguments: argparse.Namespace) -> None:
    name, alias = arguments.placeholder_token, arguments.alias
    with connect(arguments) as client:
        client.delete_alias(name, alias, etag=arguments.etag)
    print(f"{printable(f'{name}@{alias}')} deleted")


def _undelete(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        concept = client.undelete(arguments.placeholder_token)
    print(f"{printable(concept.placeholder_token)} is back, at version {concept.version}")
