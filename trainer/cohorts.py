"""Vectors that join a run one after another, and how each moves from then on.

Progressive extension (Gal et al. 2022, section 5). A vector that joins late is as new to its rule
as the first was: the steps of its moments are counted from where it joined.
"""

from itertools import groupby

import torch

from trainer.options import LearnOptions
from trainer.updates import Moments, Vectors, update_rule


def num_joined(options: LearnOptions, num_rows: int, *, step: int) -> int:
    """How many of all rows are there for the step after `step` steps."""
    return sum(options.joined_at(row) <= step for row in range(num_rows))


def moved(
    options: LearnOptions,
    initial: Vectors,
    vectors: Vectors,
    gradient: Vectors,
    moments: Moments,
    *,
    step: int,
    rate: float,
    dims: tuple[int, ...],
    norms: tuple[float, ...],
) -> tuple[Vectors, Moments]:
    """One step of all vectors that have joined; `step` counts from 1, from the run's start."""
    parts: list[tuple[Vectors, Moments]] = []
    for since, group in groupby(range(len(vectors)), key=options.joined_at):
        members = list(group)
        rows = slice(members[0], members[-1] + 1)
        rule = update_rule(options, initial[rows], dims=dims, norms=norms)
        before = Moments(first=moments.first[rows], second=moments.second[rows])
        parts.append(rule(vectors[rows], gradient[rows], before, step=step - since, rate=rate))
    return torch.cat([after for after, _ in parts]), Moments(
        first=torch.cat([after.first for _, after in parts]),
        second=torch.cat([after.second for _, after in parts]),
    )
