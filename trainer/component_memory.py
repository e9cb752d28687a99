"""What of a model is in memory while it is built: the networks in use, and no others.

A network is parked by taking its large weights away; its modules stay, so that whoever holds them
need not know. `Residence.of` reads the weights again for as long as they are needed.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.sessions import Array, Feeds, Session

# Weights of a network from which on it is parked; reading less again takes longer than it saves.
PARKED_BYTES = 256 << 20
# Of one weight. Biases, norms and positions, which graphs are made of, are never taken away.
LARGE_BYTES = 1 << 20
# The network that a graph is of, where it has another name.
_NETWORKS = {"denoiser": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}


class Residence:
    """Which networks of a model have their weights; those of less than `parked_bytes` always."""

    def __init__(self, *, parked_bytes: int | None = None) -> None:
        self._parked_bytes = PARKED_BYTES if parked_bytes is None else parked_bytes
        self._networks: dict[str, tuple[nn.Module, Callable[[], nn.Module]]] = {}
        self._users: dict[str, int] = {}

    def add(self, name: str, network: nn.Module, read: Callable[[], nn.Module]) -> None:
        """Take charge of a network that has its weights, and park it if it is large.

        `read` reads it again from where it came from.
        """
        if sum(_num_bytes(tensor) for tensor in network.parameters()) >= self._parked_bytes:
            self._networks[name] = (network, read)
            park(network)
            free_memory()

    @contextlib.contextmanager
    def of(self, *names: str) -> Generator[None]:
        """Let these networks, or those of these graphs, have their weights."""
        with contextlib.ExitStack() as stack:
            for name in dict.fromkeys(_NETWORKS.get(name, name) for name in names):
                if name in self._networks:
                    stack.enter_context(self._present(name))
            yield

    @contextlib.contextmanager
    def _present(self, name: str) -> Generator[None]:
        network, read = self._networks[name]
        users = self._users.get(name, 0)
        if not users:
            restore(network, read())
        self._users[name] = users + 1
        try:
            yield
        finally:
            self._users[name] = users
            if not users:
                park(network)
                free_memory()


def park(network: nn.Module) -> None:
    """Take a network's large weights away; what is left of them are shape and dtype.

    The others are copied: as views of the mapped file they would keep all of it in memory.
    """
    for module in network.modules():
        for name, tensor in _own(module):
            large = _num_bytes(tensor) >= LARGE_BYTES
            left = torch.empty_like(tensor, device="meta") if large else tensor.detach().clone()
            module._parameters[name] = nn.Parameter(left, requires_grad=False)


def restore(network: nn.Module, other: nn.Module) -> None:
    """Give a parked network the weights of another that is read from the same files."""
    for module, same in zip(network.modules(), other.modules(), strict=True):
        for name, tensor in _own(module):
            if tensor.device.type == "meta":
                module._parameters[name] = same._parameters[name]


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, tensor) for name, tensor in [*module._parameters.items()] if tensor is not None)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def free_memory() -> None:
    """Collect garbage and give free pages back to the system; the allocator keeps them else."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


class SessionsInTurn(Mapping[str, Session]):
    """The sessions of some components, of which one at a time is open: the last that ran."""

    def __init__(self, names: tuple[str, ...], open_session: Callable[[str], Session]) -> None:
        self._sessions = {name: _SessionInTurn(self, name) for name in names}
        self._open_session = open_session
        self._open: tuple[str, Session] | None = None

    def run(self, name: str, feeds: Feeds) -> dict[str, Array]:
        """Run one component, in the place of another."""
        if self._open is None or self._open[0] != name:
            self.close()
            self._open = (name, self._open_session(name))
        return self._open[1].run(feeds)

    def close(self) -> None:
        """Give the memory of the session that is open back."""
        self._open = None
        free_memory()

    def __getitem__(self, name: str) -> Session:
        return self._sessions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)


class _SessionInTurn:
    """One component of `SessionsInTurn`, as a session."""

    def __init__(self, sessions: SessionsInTurn, name: str) -> None:
        self._sessions, self._name = sessions, name

    def run(self, feeds: Feeds) -> dict[str, Any]:
        return self._sessions.run(self._name, feeds)
