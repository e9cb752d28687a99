"""A server from its configuration to its drained stop, as the main task of a process."""

import asyncio
import dataclasses
import logging
import signal
from collections.abc import Callable

from engine.errors import ConfigError
from engine.security.credentials import read_credentials
from engine.security.tls import Certificates
from engine.serving.deployment import close_model, measured
from engine.serving.model_opening import in_daemon_thread, model_opener
from engine.serving.server import Server
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import ConceptStore, StoreConfig

logger = logging.getLogger(__name__)


async def serve(
    config: ServerConfig, on_ready: Callable[[str], None] = lambda _address: None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    `on_ready` is told the address once the server listens.
    """
    await asyncio.to_thread(_check_files, config)
    planner, model = await in_daemon_thread(model_opener(config), config.bundle)
    try:
        costs = await asyncio.to_thread(measured, planner, model, config.batcher)
        store = await asyncio.to_thread(open_store, config)
        server = Server(planner, store, config, model=model, costs=costs)
    except BaseException:
        close_model(model)
        raise
    told_to_stop = asyncio.Event()
    try:
        address = await server.start()
        _on_signals(told_to_stop.set)
        logger.info("serving %s on %s", planner.bundle.manifest.model_name, address)
        if config.insecure:
            logger.warning("insecure: whoever reaches %s may not be asked who it is", address)
        on_ready(address)
        await told_to_stop.wait()
        logger.info("stopping; requests under way have %g s", config.grace_s)
    finally:
        await server.stop(config.grace_s)


def open_store(config: ServerConfig) -> ConceptStore:
    """The concepts that a server is told to keep; in a folder that goes away where it is not."""
    if config.concept_dir is None and not config.concept_index and not config.concept_files:
        return ConceptStore.temporary(config.store)
    return ConceptStore(
        StoreConfig(
            folder=config.concept_dir,
            index=config.concept_index,
            files=config.concept_files,
            **dataclasses.asdict(config.store),
        )
    )


def _check_files(config: ServerConfig) -> None:
    """Refuse what cannot be used before time goes into loading a model."""
    security = config.security
    if config.bundle_dir is not None and not config.bundle_dir.is_dir():
        raise ConfigError(
            f"bundle_dir {config.bundle_dir} is not a folder; name the one that the bundles lie in"
        )
    if certificates := Certificates.of(security):
        certificates.read()
    if security.credentials is not None:
        read_credentials(security.credentials)


def _on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def first_signal() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # Python's own SIGINT handler waits for threads
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first_signal)
