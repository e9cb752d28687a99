"""Batches of compositions, in order, composed by worker processes where there are cores for it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from models.recipe.compositions import Composer


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures with their captions."""

    pixels: UInt8[np.ndarray, "batch size size 3"]
    captions: list[str]


# What workers hand over: a tensor lies in shared memory, an array would be copied through a pipe.
_Composed = tuple[UInt8[Tensor, "batch size size 3"], list[str]]


class _Batches(Dataset[_Composed]):
    def __init__(self, composer: Composer, batch_size: int, first: int) -> None:
        self._composer, self._batch_size, self._first = composer, batch_size, first

    def __getitem__(self, index: int) -> _Composed:
        start = self._first + index * self._batch_size
        drawn = [self._composer.compose(start + place) for place in range(self._batch_size)]
        pixels = torch.from_numpy(np.stack([one.pixels for one in drawn]))
        return pixels, [one.caption for one in drawn]


class _InOrder(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        place = 0
        while True:
            yield place
            place += 1


def composed_batches(
    composer: Composer, batch_size: int, first: int, device: torch.device
) -> Iterator[Batch]:
    """Endless batches of the compositions `first`, `first + 1`, ..."""
    # Beside a GPU all other cores compose; on a CPU composing takes a twentieth of the time, and a
    # second process would only compete with the training.
    beside_gpu = device.type == "cuda"
    workers = max(1, (os.cpu_count() or 1) - 2) if beside_gpu else 0
    loader = DataLoader(
        _Batches(composer, batch_size, first),
        batch_size=None,
        sampler=_InOrder(),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=beside_gpu,
        generator=torch.Generator(),  # its own: loading must not move the noise of the training
    )
    for pixels, captions in loader:
        yield Batch(pixels.numpy(), captions)


def to_tensor(
    pixels: UInt8[np.ndarray, "batch size size 3"], device: torch.device
) -> Float32[Tensor, "batch 3 size size"]:
    """Pictures as the model takes them: channels first (in a channels-last layout), -1 to 1."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    tensor = tensor.to(device, non_blocking=True)  # of use where the pixels are pinned
    return (tensor.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(
        memory_format=torch.channels_last
    )
