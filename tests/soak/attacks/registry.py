"""The attacks that there are, by name."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.soak.field import Field

Run = Callable[[Field, random.Random], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """Something that must end in statuses, a live server and flat memory."""

    name: str
    groups: tuple[int, ...]  # of docs/attacks.md
    run: Run


ATTACKS: dict[str, Attack] = {}


def attack(*groups: int) -> Callable[[Run], Run]:
    """Register a function as an attack of these groups."""

    def register(run: Run) -> Run:
        name = run.__name__  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
        assert isinstance(name, str) and name not in ATTACKS
        ATTACKS[name] = Attack(name=name, groups=groups, run=run)
        return run

    return register
