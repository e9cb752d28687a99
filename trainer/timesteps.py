"""Which timesteps a batch is noised to: stratified, uniform or with a share of noisier ones."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# Of the logit-normal part (Esser et al. 2024, arXiv 2403.03206, section 3.1): its median lies at
# 0.73 of the schedule, nine tenths of it above 0.43.
FOCUS_MEAN = 1.0
FOCUS_DEVIATION = 1.0


def stratified_timesteps(
    batch_size: int,
    num_train_timesteps: int,
    generator: torch.Generator,
    *,
    focus: float = 0.0,
) -> Int64[Tensor, " batch"]:
    """One draw in each of `batch_size` equally likely parts of the schedule, in random order.

    Each timestep is as likely as with independent draws; the mean over a batch varies less.
    A share `focus` of the draws is logit-normal, biased to noise; the rest is uniform.
    """
    part = torch.randperm(batch_size, generator=generator)
    offset = torch.rand(batch_size, generator=generator)
    quantiles = (part + offset) / batch_size
    if focus == 0.0:
        timesteps = (quantiles * num_train_timesteps).long()
    else:
        edges = focused_cdf(num_train_timesteps, focus)
        timesteps = torch.searchsorted(edges, quantiles.double(), right=True) - 1
    return timesteps.clamp(max=num_train_timesteps - 1)  # float32 may round up to the end


def focused_cdf(num_train_timesteps: int, focus: float) -> Float64[Tensor, " timesteps_and_one"]:
    """The probability of a timestep below 0, 1, ... `num_train_timesteps`, as `focus` mixes it.

    (1 - focus) u + focus Phi((logit(u) - mean) / deviation), at u = t / num_train_timesteps.
    """
    position = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    logit_normal = torch.special.ndtr((position.logit() - FOCUS_MEAN) / FOCUS_DEVIATION)
    return torch.lerp(position, logit_normal, focus)
