"""`oneword concepts`: learned words as files and in the store of a server."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engine.concepts import Concept, concept_from_bytes, concept_to_bytes
from engine.dialects.readers import TORCH_SUFFIXES, read_concepts
from engine.dialects.writers import DIALECTS, NAMED_BY_FILE, write_dialect
from engine.errors import InvalidRequest
from engine.printing import printable
from oneword.concept_versions import add_actions, add_etag, time_of
from oneword.connection import add_server_action, connect
from protos.oneword.v1 import concepts_pb2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each thing that can be done with a concept."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_import(actions.add_parser("import", help="store a concept file on a server"))
    add_server_action(
        actions.add_parser("list", help="list the concepts that a server stores"), _list
    )
    show = actions.add_parser("show", help="describe a concept file, or a stored concept")
    show.add_argument("concept", metavar="FILE_OR_NAME")
    _add_text_encoder_2(show)
    add_server_action(show, _show)
    _add_export(actions.add_parser("export", help="write a concept file in another format"))
    delete = actions.add_parser("delete", help="remove a stored concept")
    delete.add_argument("placeholder_token", metavar="NAME")
    add_etag(delete)
    add_server_action(delete, _delete)
    add_actions(actions)


def run(arguments: argparse.Namespace) -> int:
    arguments.action(arguments)
    return 0


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="of any tool: docs/concepts.md lists them")
    _add_text_encoder_2(parser)
    parser.add_argument("--placeholder-token", metavar="NAME", help="store it under this name")
    parser.add_argument("--overwrite", action="store_true", help="publish a new version of it")
    add_etag(parser)
    add_server_action(parser, _import)


def _add_text_encoder_2(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-encoder-2",
        type=Path,
        metavar="FILE",
        help="the second file of an SDXL concept, diffusers' learned_embeds_2",
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="FILE_OR_NAME")
    _add_text_encoder_2(parser)
    parser.add_argument("--only", metavar="NAME", help="the one to take of a file with several")
    parser.add_argument("--format", choices=DIALECTS, default="oneword")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--placeholder-token", metavar="NAME", help="rename it in the new file")
    add_server_action(parser, _export)


def _import(arguments: argparse.Namespace) -> None:
    concepts = read_concepts(
        arguments.file,
        placeholder_token=arguments.placeholder_token,
        path_2=arguments.text_encoder_2,
    )
    if arguments.etag and len(concepts) > 1:
        raise InvalidRequest(
            f"--etag is that of one name, {arguments.file} holds {len(concepts)} concepts; import "
            "it without, or split it with `oneword concepts export --only NAME`",
            field="etag",
        )
    with connect(arguments) as client:
        for concept in concepts:
            reply = client.import_concept(
                concept_to_bytes(concept), overwrite=arguments.overwrite, etag=arguments.etag
            )
            state = "stored" if reply.changed else "was there already"
            token, concept_id = printable(reply.concept.placeholder_token), reply.concept.concept_id
            print(f"{token} {printable(concept_id[:12])} {state}")


def _list(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        for concept in client.list():
            print(
                f"{printable(concept.placeholder_token):<24} {printable(concept.concept_id[:12])} "
                f"{concept.num_vectors:>3} x {concept.dim:<5} {time_of(concept)}"
            )


def _show(arguments: argparse.Namespace) -> None:
    if is_concept_file(arguments.concept):
        path, path_2 = Path(arguments.concept), arguments.text_encoder_2
        for number, concept in enumerate(read_concepts(path, path_2=path_2)):
            if number:
                print()
            widths = " + ".join(map(str, concept.dims))
            _print_concept(concept, f"{concept.num_vectors} x {widths}", concept.metadata)
        return
    _refuse_options_of_files(arguments.concept, arguments.text_encoder_2)
    with connect(arguments) as client:
        stored = client.get(arguments.concept)
    in_store = {
        "version": str(stored.version),
        "aliases": ", ".join(stored.aliases) or "none",
        "stored": time_of(stored),
        "etag": stored.etag,
    }
    vectors = f"{stored.num_vectors} x {stored.dim}"
    _print_concept(stored, vectors, dict(stored.metadata), in_store)


def _print_concept(
    concept: Concept | concepts_pb2.Concept,
    vectors: str,
    metadata: Mapping[str, str],
    in_store: Mapping[str, str] | None = None,
) -> None:
    _print_fields(
        {
            "placeholder_token": concept.placeholder_token,
            "concept_id": concept.concept_id,
            "vectors": vectors,
            "embedding_fingerprint": concept.embedding_fingerprint or "unknown",
            **(in_store or {}),
            **{f"metadata.{name}": value for name, value in sorted(metadata.items())},
        }
    )


def is_concept_file(concept: str) -> bool:
    """A name that ends like a file is one, so that a mistyped path is not looked up on a server."""
    # Not Path.is_file, which raises for names that no file can have.
    return os.path.isfile(concept) or concept.endswith((".safetensors", *TORCH_SUFFIXES))


def _print_fields(fields: Mapping[str, str]) -> None:
    lines = [(printable(name), printable(value)) for name, value in fields.items()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _export(arguments: argparse.Namespace) -> None:
    concept = _concept_to_export(arguments)
    for path in write_dialect(concept, arguments.output, arguments.format):
        print(printable(path))
    called = arguments.output.stem
    if arguments.format in NAMED_BY_FILE and called != concept.placeholder_token:
        print(
            f"note: this tool calls a concept as its file is called: {printable(called)}, not "
            f"{printable(concept.placeholder_token)}",
            file=sys.stderr,
        )


def _concept_to_export(arguments: argparse.Namespace) -> Concept:
    name, rename = arguments.concept, arguments.placeholder_token
    if not is_concept_file(name):
        _refuse_options_of_files(name, arguments.text_encoder_2, arguments.only)
        with connect(arguments) as client:
            content = client.export(name)
        return concept_from_bytes(content, source=name, placeholder_token=rename)
    concepts = read_concepts(
        Path(name),
        placeholder_token=None if arguments.only else rename,
        path_2=arguments.text_encoder_2,
    )
    concept = _only(concepts, arguments.only, name)
    return replace(concept, placeholder_token=rename or concept.placeholder_token)


def _refuse_options_of_files(name: str, *options: object) -> None:
    if any(option is not None for option in options):
        raise InvalidRequest(
            f"{name!r} is no file, so it is looked up on the server, where --text-encoder-2 and "
            "--only mean nothing; leave them out, or name a file"
        )


def _only(concepts: Sequence[Concept], wanted: str | None, source: str) -> Concept:
    found = [concept for concept in concepts if wanted in (None, concept.placeholder_token)]
    if len(found) != 1:
        tokens = ", ".join(concept.placeholder_token for concept in concepts)
        raise InvalidRequest(
            f"{source} holds {tokens}; choose one of them with --only NAME", field="only"
        )
    return found[0]


def _delete(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        client.delete(arguments.placeholder_token, etag=arguments.etag)
    print(f"{arguments.placeholder_token} deleted")
