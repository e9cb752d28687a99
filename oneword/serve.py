"""`oneword serve`: a bundle behind gRPC until it is told to stop."""

import argparse
import asyncio
import logging
from pathlib import Path

from engine.backends.names import BACKENDS
from engine.config_file import build, read_config_file
from engine.config_text import example, to_toml
from engine.operations.log_queue import never_wait_for
from engine.operations.logs import configure_logging
from engine.operations.operations import check_available
from engine.serving.serve import serve
from engine.serving.server_config import ServerConfig
from oneword.config_flags import Flag, add_config_flags, given_settings

# The settings that have a flag; the file has all of them (examples/server.toml).
_FLAGS: dict[str, str | Flag] = {
    "bundle": "folder by build_engines.py",
    "bundle_dir": "folder of bundles from which `oneword deploy` puts one in service by name; "
    "without it none can be",
    "listen": "address to listen on; port 0 takes a free one",
    "insecure": "listen beyond this machine without TLS, or without authentication",
    "concept_dir": "folder of the stored concepts; without it they are forgotten at the end",
    "concept_index": "database of the stored concepts in place of SQLite in --concept-dir, for "
    "several servers: postgresql://user@host/database (needs oneword[postgres])",
    "concept_files": "place of their files in place of --concept-dir: a folder, or a URL such as "
    "s3://bucket/concepts (needs oneword[fsspec])",
    "store.max_concepts_per_tenant": "names that one tenant may store",
    "store.max_bytes_per_tenant": "bytes of concept files that one tenant may store",
    "store.grace_s": Flag(
        "seconds for which a deleted or replaced concept can be had by its digest",
        "concept-grace-s",
    ),
    "job_dir": "folder of the jobs; without it the server keeps none",
    "backend": f"what runs the model: {', '.join(BACKENDS)} (docs/backends.md)",
    "grace_s": "seconds that requests under way get when the server is told to stop",
    "reflection": "describe the services to whoever asks (the default)",
    "limits.max_pixels": "width x height of one image (default: 16 times the model's own, at most "
    "1048576)",
    "batcher.max_batch_rows": "rows of one call at the model's own size (guidance makes two of an "
    "image); fewer of larger images",
    "batcher.max_images_in_flight": "images that advance together",
    "batcher.max_queued_images": "images that may wait; more are refused",
    "batcher.max_queued_ms": "work that may wait, in milliseconds of the device",
    "batcher.result_cache_bytes": "memory for finished images, given again for equal requests "
    "(none)",
    "training.training_model": "diffusers folder that the bundle was built from; without it the "
    "server does not learn words (needs oneword[train])",
    "training.training_dir": "folder of the trainings (default: beside --concept-dir)",
    "training.training_device": "PyTorch device that learns (default: a GPU if there is one)",
    "training.max_training_jobs": "trainings that learn at the same time",
    "training.max_queued_trainings": "trainings that may wait; more are refused",
    "security.tls_cert": "serve TLS with this certificate (PEM, with those between it and its CA)",
    "security.tls_key": "its private key (PEM)",
    "security.tls_client_ca": "have clients show certificates of this CA (PEM)",
    "security.credentials": "who may call, by token or certificate: `oneword tokens create` makes "
    "it (docs/security.md)",
    "security.authenticate_health": "have health checks need credentials too",
    "security.authenticate_reflection": Flag(
        "have reflection need no credentials", "open-reflection", False
    ),
    "security.trusted_keys": Flag(
        "open only bundles signed with the key of this public one; repeatable", "trusted-key"
    ),
    "operations.log_format": "of the log on stderr",
    "operations.access_log": "log a line for each call (the default)",
    "operations.metrics_listen": "HTTP port for /metrics, /healthz and /readyz, as [HOST:]PORT; "
    "the host is 127.0.0.1 (needs oneword[metrics])",
    "operations.trace_exporter": "where OpenTelemetry traces go: otlp, console, or the name of an "
    "exporter that is installed (needs oneword[tracing])",
    "operations.trace_sample_ratio": "share of calls that are traced, where the caller does not "
    "say",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags carry the names of the settings; what is not given is left to the file."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with settings; flags overrule it"
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the settings that would count, as TOML, and do not serve",
    )
    parser.add_argument(
        "--example-config",
        action="store_true",
        help="print all settings with their defaults, as TOML to edit, and do not serve",
    )
    add_config_flags(parser, ServerConfig, _FLAGS)


def config_from(arguments: argparse.Namespace) -> ServerConfig:
    """The configuration by file and flags; raises `ConfigError`."""
    path: Path | None = arguments.config
    return build(
        ServerConfig,
        {} if path is None else read_config_file(path),
        overrides=given_settings(arguments),
        folder=Path() if path is None else path.parent,
        source="the flags" if path is None else str(path),
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; the server tells what it does on stderr."""
    if arguments.example_config:
        print(example(ServerConfig(bundle=Path("bundles/emoji"))), end="")
        return 0
    config = config_from(arguments)
    if arguments.print_config:
        print(to_toml(config), end="")
        return 0
    check_available(config.operations)
    never_wait_for(configure_logging(config.operations.log_format))
    logging.getLogger("engine").setLevel(logging.INFO)
    # The line that scripts wait for; everything else goes to the log on stderr.
    asyncio.run(serve(config, lambda address: print(f"listening on {address}", flush=True)))
    return 0
