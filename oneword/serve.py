"""`oneword serve`: a bundle behind gRPC until it is told to stop."""

import argparse
import asyncio
import dataclasses
import logging
from pathlib import Path

from engine.batcher import BatcherConfig
from engine.requests import Limits
from engine.security_config import SecurityConfig
from engine.server import ServerConfig, serve
from engine.training_config import TrainingConfig

_FLAGS = {
    "listen": "address to listen on; port 0 takes a free one",
    "concept_dir": "folder of the stored concepts; without it they are forgotten at the end",
    "job_dir": "folder of the jobs; without it the server keeps none",
    "concept_index": "database of the stored concepts in place of SQLite in --concept-dir, for "
    "several servers: postgresql://user@host/database (needs oneword[postgres])",
    "concept_files": "place of their files in place of --concept-dir: a folder, or a URL such as "
    "s3://bucket/concepts (needs oneword[fsspec])",
    "execution_provider": "ONNX Runtime execution provider",
    "grace_s": "seconds that requests under way get when the server is told to stop",
}
_SECURITY_FLAGS = {
    "tls_cert": "serve TLS with this certificate (PEM, with those between it and its CA)",
    "tls_key": "its private key (PEM)",
    "tls_client_ca": "have clients show certificates of this CA (PEM)",
    "credentials": "who may call, by token or certificate: `oneword tokens create` makes it "
    "(docs/security.md)",
}
# Of flags without a default; the others are paths.
_OPTIONAL_TYPES = {"training_device": str}
_BATCHER_FLAGS = {
    "max_batch_rows": "rows of one call at the model's own size (guidance makes two of an image); "
    "fewer of larger images",
    "max_images_in_flight": "images that advance together",
    "max_queued_images": "images that may wait; more are refused",
}
_TRAINING_FLAGS = {
    "training_model": "diffusers folder that the bundle was built from; without it the server "
    "does not learn words (needs oneword[train])",
    "training_dir": "folder of the trainings (default: beside --concept-dir)",
    "training_device": "PyTorch device that learns (default: a GPU if there is one)",
    "max_training_jobs": "trainings that learn at the same time",
    "max_queued_trainings": "trainings that may wait; more are refused",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags carry the names of `ServerConfig` and `BatcherConfig`, and their defaults."""
    parser.add_argument("--bundle", type=Path, required=True, help="folder by build_engines.py")
    _add_flags(parser, ServerConfig, _FLAGS)
    _add_flags(parser, BatcherConfig, _BATCHER_FLAGS)
    _add_flags(parser, TrainingConfig, _TRAINING_FLAGS)
    parser.add_argument(
        "--max-pixels",
        type=int,
        help="width x height of one image (default: 16 times the model's own, at most 1048576)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen beyond this machine without TLS, or without authentication",
    )
    parser.add_argument("--no-reflection", dest="reflection", action="store_false")
    _add_security(parser)


def _add_security(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security")
    _add_flags(group, SecurityConfig, _SECURITY_FLAGS)
    group.add_argument(
        "--authenticate-health",
        action="store_true",
        help="have health checks need credentials too",
    )
    group.add_argument(
        "--open-reflection",
        dest="authenticate_reflection",
        action="store_false",
        help="have reflection need no credentials",
    )
    group.add_argument(
        "--trusted-key",
        dest="trusted_keys",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="open only bundles signed with the key of this public one; repeatable",
    )


def _add_flags(parser: argparse._ActionsContainer, config: type, flags: dict[str, str]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, summary in flags.items():
        default = defaults[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=_OPTIONAL_TYPES.get(name, Path) if default is None else type(default),
            default=default,
            help=summary + ("" if default in (None, "") else f" (default: {default})"),
        )


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; the server tells what it does on stderr."""
    logging.getLogger("engine").setLevel(logging.INFO)
    batcher = BatcherConfig(**{name: getattr(arguments, name) for name in _BATCHER_FLAGS})
    training = TrainingConfig(**{name: getattr(arguments, name) for name in _TRAINING_FLAGS})
    security = SecurityConfig(
        authenticate_health=arguments.authenticate_health,
        authenticate_reflection=arguments.authenticate_reflection,
        trusted_keys=tuple(arguments.trusted_keys),
        **{name: getattr(arguments, name) for name in _SECURITY_FLAGS},
    )
    config = ServerConfig(
        bundle=arguments.bundle,
        batcher=batcher,
        training=training,
        security=security,
        limits=Limits(max_pixels=arguments.max_pixels),
        insecure=arguments.insecure,
        reflection=arguments.reflection,
        **{name: getattr(arguments, name) for name in _FLAGS},
    )
    # The line that scripts wait for; everything else goes to the log on stderr.
    asyncio.run(serve(config, lambda address: print(f"listening on {address}", flush=True)))
    return 0
