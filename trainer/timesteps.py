"""Which timesteps a batch is noised to."""

import torch
from jaxtyping import Int64
from torch import Tensor


def stratified_timesteps(
    batch_size: int, num_train_timesteps: int, generator: torch.Generator
) -> Int64[Tensor, " batch"]:
    """One draw in each of `batch_size` equally likely parts of the schedule, in random order.

    Each timestep is as likely as with independent draws; the mean over a batch varies less.
    """
    part = torch.randperm(batch_size, generator=generator)
    offset = torch.rand(batch_size, generator=generator)
    timesteps = ((part + offset) / batch_size * num_train_timesteps).long()
    return timesteps.clamp(max=num_train_timesteps - 1)  # float32 may round up to the end
