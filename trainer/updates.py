"""How the vectors move: the rules that turn a gradient into the next vectors, as pure functions."""

import math
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from jaxtyping import Float32
from torch import Tensor

Vectors = Float32[Tensor, "num_vectors dim"]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_SMALLEST_GRADIENT = 1e-12


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

    def direction(self, step: int) -> Vectors:
        """The unbiased mean gradient by its deviation, after `step` (1, 2, ...) gradients."""
        unbiased = self.first / (1 - _BETAS[0] ** step)
        deviation = (self.second / (1 - _BETAS[1] ** step)).sqrt()
        return unbiased / (deviation + _EPSILON)


class Update(Protocol):
    """One step of a rule. `step` counts from 1."""

    def __call__(
        self, vectors: Vectors, gradient: Vectors, moments: Moments, *, step: int, rate: float
    ) -> tuple[Vectors, Moments]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), as the paper's code has it; then no
    longer than `max_norm`, if that is given."""

    weight_decay: float = 0.0
    max_norm: float = math.inf

    def __call__(
        self, vectors: Vectors, gradient: Vectors, moments: Moments, *, step: int, rate: float
    ) -> tuple[Vectors, Moments]:
        moments = moments.after(gradient)
        decayed = vectors * (1 - rate * self.weight_decay)
        return shortened(decayed - rate * moments.direction(step), self.max_norm), moments


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

    def __call__(
        self, vectors: Vectors, gradient: Vectors, moments: Moments, *, step: int, rate: float
    ) -> tuple[Vectors, Moments]:
        directions = _unit(vectors)
        # The loss is a function of norm x direction: the chain rule brings the norm in.
        pulled = self.norm * gradient - self.kappa * self.prior
        along = (pulled * directions).sum(dim=1, keepdim=True)
        turned = directions - rate * _unit(pulled - along * directions)
        return self.norm * _unit(turned), moments


def shortened(vectors: Vectors, max_norm: float) -> Vectors:
    """The vectors, those longer than `max_norm` scaled back to it."""
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors * (norms.clamp(max=max_norm) / norms.clamp(min=_SMALLEST_GRADIENT))


def _unit(rows: Vectors) -> Vectors:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=_SMALLEST_GRADIENT)
