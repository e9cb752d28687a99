"""The pull back to the coarse word (Gal et al. 2022, section 5, regularization)."""

import torch
from jaxtyping import Float32
from torch import Tensor

Vectors = Float32[Tensor, "num_vectors all_dims"]


def pull_to_start(
    vectors: Vectors, initial: Vectors, *, weight: float, count: int
) -> tuple[float, Vectors]:
    """What is added to the loss of a step, and to its gradient in the vectors.

    weight x the mean over the first `count` vectors of the squared distance to where each started;
    the rest are free. For one vector this is the authors' `embedding_reg_weight`; for several
    theirs is the squared length of the mean difference, which lets vectors part without end.
    """
    away = torch.zeros_like(vectors)
    away[:count] = (vectors - initial)[:count]
    share = weight / len(vectors[:count])
    return share * away.square().sum().item(), 2 * share * away
