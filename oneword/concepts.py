"""`oneword concepts`: learned words as files and in the store of a server."""

import argparse
import os
from collections.abc import Callable, Mapping
from datetime import UTC
from pathlib import Path

from engine.client import Client
from engine.concepts import concept_from_bytes, concept_to_bytes, read_concept, write_concept
from engine.endpoint import DEFAULT_ADDRESS
from engine.printing import printable
from protos.oneword.v1 import concepts_pb2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each thing that can be done with a concept."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_import(actions.add_parser("import", help="store a concept file on a server"))
    _add(actions.add_parser("list", help="list the concepts that a server stores"), _list)
    show = actions.add_parser("show", help="describe a concept file, or a stored concept")
    show.add_argument("concept", metavar="FILE_OR_NAME")
    _add(show, _show)
    _add_export(actions.add_parser("export", help="write a concept file in another format"))
    delete = actions.add_parser("delete", help="remove a stored concept")
    delete.add_argument("placeholder_token", metavar="NAME")
    _add(delete, _delete)


def run(arguments: argparse.Namespace) -> int:
    arguments.action(arguments)
    return 0


def _add(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None]) -> None:
    parser.add_argument(
        "--server", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="default: %(default)s"
    )
    parser.set_defaults(action=action)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--placeholder-token", metavar="NAME", help="store it under this name")
    parser.add_argument("--overwrite", action="store_true", help="replace other vectors")
    _add(parser, _import)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="FILE_OR_NAME")
    parser.add_argument("--format", choices=("oneword", "diffusers"), default="oneword")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--placeholder-token", metavar="NAME", help="rename it in the new file")
    _add(parser, _export)


def _import(arguments: argparse.Namespace) -> None:
    concept = read_concept(arguments.file, placeholder_token=arguments.placeholder_token)
    with Client(arguments.server) as client:
        reply = client.import_concept(concept_to_bytes(concept), overwrite=arguments.overwrite)
    state = "stored" if reply.changed else "was there already"
    token, concept_id = printable(reply.concept.placeholder_token), reply.concept.concept_id
    print(f"{token} {printable(concept_id[:12])} {state}")


def _list(arguments: argparse.Namespace) -> None:
    with Client(arguments.server) as client:
        for concept in client.list():
            print(
                f"{printable(concept.placeholder_token):<24} {printable(concept.concept_id[:12])} "
                f"{concept.num_vectors:>3} x {concept.dim:<5} {_time_of(concept)}"
            )


def _time_of(concept: concepts_pb2.Concept) -> str:
    return concept.import_time.ToDatetime(UTC).astimezone().isoformat(" ", "seconds")


def _show(arguments: argparse.Namespace) -> None:
    if is_concept_file(arguments.concept):
        concept = read_concept(Path(arguments.concept))
        num_vectors, dim = concept.learned_embeddings.shape
        metadata = concept.metadata
    else:
        with Client(arguments.server) as client:
            concept = client.get(arguments.concept)
        num_vectors, dim = concept.num_vectors, concept.dim
        metadata = dict(concept.metadata)
    _print_fields(
        {
            "placeholder_token": concept.placeholder_token,
            "concept_id": concept.concept_id,
            "vectors": f"{num_vectors} x {dim}",
            "embedding_fingerprint": concept.embedding_fingerprint or "unknown",
            **{f"metadata.{name}": value for name, value in sorted(metadata.items())},
        }
    )


def is_concept_file(concept: str) -> bool:
    """A name that ends like a file is one, so that a mistyped path is not looked up on a server."""
    # Not Path.is_file, which raises for names that no file can have.
    return os.path.isfile(concept) or concept.endswith(".safetensors")


def _print_fields(fields: Mapping[str, str]) -> None:
    lines = [(printable(name), printable(value)) for name, value in fields.items()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _export(arguments: argparse.Namespace) -> None:
    name, rename = arguments.concept, arguments.placeholder_token
    if is_concept_file(name):
        concept = read_concept(Path(name), placeholder_token=rename)
    else:
        with Client(arguments.server) as client:
            content = client.export(name)
        concept = concept_from_bytes(content, source=name, placeholder_token=rename)
    write_concept(concept, arguments.output, arguments.format)
    print(arguments.output)


def _delete(arguments: argparse.Namespace) -> None:
    with Client(arguments.server) as client:
        client.delete(arguments.placeholder_token)
    print(f"{arguments.placeholder_token} deleted")
