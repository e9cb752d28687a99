"""The noise is PyTorch's own: without it no image could be compared with one by diffusers."""

import numpy as np
import pytest
import torch

from engine.noise import TorchGenerator

# Both sides compute log, sin and cos in float32 with different libraries: a few units in the last
# place of values up to about 5.
ROUNDING = 5e-6


def torch_randn(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_noise_equals_torch_for_every_size_of_seed(seed: int) -> None:
    (expected,) = torch_randn(seed, (1, 4, 8, 8))
    np.testing.assert_allclose(TorchGenerator(seed).randn((1, 4, 8, 8)), expected, atol=ROUNDING)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 32, 100, 1000, 4 * 64 * 64])
def test_noise_equals_torch_for_every_length(size: int) -> None:
    (expected,) = torch_randn(3, (size,))
    np.testing.assert_allclose(TorchGenerator(3).randn((size,)), expected, atol=ROUNDING)


def test_draws_continue_one_stream() -> None:
    shapes = [(3,), (1, 4, 5, 7), (1,), (2, 2), (64,), (5,)]
    generator = TorchGenerator(11)
    for shape, expected in zip(shapes, torch_randn(11, *shapes), strict=True):
        np.testing.assert_allclose(generator.randn(shape), expected, atol=ROUNDING)
