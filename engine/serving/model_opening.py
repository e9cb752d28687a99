"""How a server opens bundles: trusted, in a process of the model's own or in this one."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engine.backends.names import CPU, plain_provider
from engine.backends.opening import open_model
from engine.batching.model import Model
from engine.bundle import Bundle, Manifest, TextSpec
from engine.errors import DeploymentFailed, EngineError
from engine.pipeline import Pipeline
from engine.planner import Planner
from engine.requests import Limits
from engine.security.bundle_signatures import check_bundle, read_trusted_manifest
from engine.serving.deployment import OpenModel
from engine.serving.server_config import ServerConfig
from engine.worker.remote_model import open_remote

T = TypeVar("T")


def model_opener(config: ServerConfig) -> OpenModel:
    """How bundles are opened: the first one, and those that are deployed later."""
    settings: dict[str, Any] = {"backend": config.backend, "limits": config.limits}
    if config.model_process:
        opens: OpenModel = partial(open_remote, config=config.worker, **settings)
    else:
        opens = partial(open_here, **settings)

    def open_trusted(bundle: Path) -> tuple[Planner, Model]:
        if config.security.trusted_keys:
            check_bundle(bundle, config.security.trusted_keys)
        return opens(bundle)

    return open_trusted


async def in_daemon_thread(function: Callable[[Path], T], bundle: Path) -> T:
    """Unlike one of a pool's, this thread does not hold up a process that is told to end."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(function(bundle))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="opening a bundle", daemon=True).start()
    return await asyncio.wrap_future(result)


def open_here(
    bundle_path: Path, *, backend: str = CPU, limits: Limits | None = None
) -> tuple[Planner, Model]:
    """Both halves of a model in this process."""
    if provider := plain_provider(backend):
        pipeline = Pipeline.open(bundle_path, execution_provider=provider, limits=limits)
        return pipeline, pipeline
    bundle = Bundle.open(bundle_path)
    return Planner(bundle, limits=limits or Limits()), open_model(bundle, backend)


def manifest_to_deploy(bundle: Path, trusted_keys: Sequence[Path]) -> Manifest:
    """What a bundle says of itself; raises `DeploymentFailed`."""
    try:
        return read_trusted_manifest(bundle, trusted_keys)
    except (EngineError, OSError) as error:
        raise DeploymentFailed(str(error)) from error


def check_words_fit(new: Manifest, serving: Manifest) -> None:
    """Raise `DeploymentFailed` for a bundle that has no use for the words of the one in service."""
    pairs = [(serving.text, new.text), (serving.text_2, new.text_2)]
    for old_fingerprint, fingerprint in [tuple(map(_fingerprint, pair)) for pair in pairs]:
        if old_fingerprint != fingerprint:
            raise DeploymentFailed(
                f"this server learns words for {serving.model_name}, with token embeddings "
                f"{old_fingerprint[:12]}..., the new bundle has {fingerprint[:12]}...; start "
                "another server for it"
            )


def _fingerprint(text: TextSpec | None) -> str:
    return "none" if text is None else text.embedding_fingerprint
