"""How the vectors move: the rules that turn a gradient into the next vectors, as pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from jaxtyping import Float32
from torch import Tensor

from trainer.options import LearnOptions

Vectors = Float32[Tensor, "num_vectors dim"]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_SMALLEST_NORM = 1e-12
_PAPER_WEIGHT_DECAY = 1e-2  # PyTorch's default, which the paper's code leaves as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Running means of the gradient and of its square (Adam, arXiv 1412.6980, algorithm 1)."""

    first: Vectors
    second: Vectors

    @classmethod
    def zeros_like(cls, vectors: Vectors) -> Self:
        return cls(first=torch.zeros_like(vectors), second=torch.zeros_like(vectors))

    def after(self, gradient: Vectors) -> Self:
        return type(self)(
            first=torch.lerp(gradient, self.first, _BETAS[0]),
            second=torch.lerp(gradient.square(), self.second, _BETAS[1]),
        )

    def step(self, count: int, *, rate: float) -> Vectors:
        """`rate` times the unbiased mean gradient by its deviation, after `count` gradients."""
        unbiased = self.first / (1 - _BETAS[0] ** count)
        deviation = (self.second / (1 - _BETAS[1] ** count)).sqrt()
        return rate * unbiased / (deviation + _EPSILON)


class Update(Protocol):
    """A rule by which vectors move."""

    def start(self, vectors: Vectors) -> Vectors:
        """Initial vectors as the rule wants them."""
        ...

    def __call__(
        self, vectors: Vectors, gradient: Vectors, moments: Moments, *, step: int, rate: float
    ) -> tuple[Vectors, Moments]:
        """One step. `step` counts from 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), as the paper's code has it; then no
    longer than `max_norm`, if that is given."""

    weight_decay: float = 0.0
    max_norm: float = math.inf
    unit: float = 1.0  # of the rate

    def start(self, vectors: Vectors) -> Vectors:
        return shortened(vectors, self.max_norm)

    def __call__(
        self, vectors: Vectors, gradient: Vectors, moments: Moments, *, step: int, rate: float
    ) -> tuple[Vectors, Moments]:
        moments, rate = moments.after(gradient), rate * self.unit
        decayed = vectors * (1 - rate * self.weight_decay)
        return shortened(decayed - moments.step(step, rate=rate), self.max_norm), moments


@dataclass(frozen=True, slots=True, kw_only=True)
class SphericalDescent:
    """Riemannian gradient descent on the sphere of one length (DTI, arXiv 2512.13672, section 4).

    Only the direction of a vector is learned: of the gradient, with a constant pull `kappa`
    towards the `prior` directions, the part along the sphere is taken and normalized; the vector
    turns by `rate` radians, to first order, and is put back on the sphere.
    """

    prior: Vectors  # unit vectors, where learning started
    norm: float  # of every vector
    kappa: float = 1e-4

    def start(self, vectors: Vectors) -> Vectors:
        return self.norm * _unit(vectors)

    def __call__(
        self, vectors: Vectors, gradient: Vectors, moments: Moments, *, step: int, rate: float
    ) -> tuple[Vectors, Moments]:
        directions = _unit(vectors)
        # The loss is a function of norm x direction: the chain rule brings the norm in.
        pulled = self.norm * gradient - self.kappa * self.prior
        along = (pulled * directions).sum(dim=1, keepdim=True)
        turned = directions - rate * _unit(pulled - along * directions)
        return self.norm * _unit(turned), moments


@dataclass(frozen=True, slots=True, kw_only=True)
class PerEncoder:
    """A rule for the vectors of each text encoder, which stand side by side."""

    dims: tuple[int, ...]
    rules: tuple[Update, ...]

    def start(self, vectors: Vectors) -> Vectors:
        parts = zip(self.rules, vectors.split(self.dims, dim=1), strict=True)
        return torch.cat([rule.start(part) for rule, part in parts], dim=1)

    def __call__(
        self, vectors: Vectors, gradient: Vectors, moments: Moments, *, step: int, rate: float
    ) -> tuple[Vectors, Moments]:
        rows = (vectors, gradient, moments.first, moments.second)
        parts = zip(self.rules, *(row.split(self.dims, dim=1) for row in rows), strict=True)
        moved = [
            rule(part, slope, Moments(first=first, second=second), step=step, rate=rate)
            for rule, part, slope, first, second in parts
        ]
        return torch.cat([part for part, _ in moved], dim=1), Moments(
            first=torch.cat([after.first for _, after in moved], dim=1),
            second=torch.cat([after.second for _, after in moved], dim=1),
        )


def update_rule(
    options: LearnOptions, initial: Vectors, *, dims: Sequence[int], norms: Sequence[float]
) -> PerEncoder:
    """The rule of a run for vectors that start at `initial`.

    `dims` and `norms` are the width of the vectors for each text encoder, and the length that a
    word has there; infinite where none is to be held.
    """
    parts = zip(initial.split(list(dims), dim=1), norms, strict=True)
    return PerEncoder(
        dims=tuple(dims), rules=tuple(_rule(options, part, norm) for part, norm in parts)
    )


def _rule(options: LearnOptions, initial: Vectors, norm: float) -> Update:
    if options.optimizer == "dti":
        return SphericalDescent(prior=_unit(initial), norm=norm)
    if options.optimizer == "adamw":
        return AdamW(weight_decay=_PAPER_WEIGHT_DECAY)
    length = initial.norm(dim=1).mean().item() if math.isinf(norm) else norm
    typical = length / math.sqrt(initial.shape[1])
    return AdamW(max_norm=norm, unit=typical if options.rate_is_relative else 1.0)


def shortened(vectors: Vectors, max_norm: float) -> Vectors:
    """The vectors, those longer than `max_norm` scaled back to it."""
    if math.isinf(max_norm):
        return vectors
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors * (max_norm / norms.clamp(min=max_norm))


def _unit(rows: Vectors) -> Vectors:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=_SMALLEST_NORM)
