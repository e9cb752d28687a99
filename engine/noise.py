"""Normal noise equal to PyTorch's on the CPU, without PyTorch.

Reimplements what `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` computes
in float32 (aten/src/ATen/native/cpu/DistributionTemplates.h, ATen/core/DistributionsHelper.h): a
Mersenne twister, then Box-Muller on blocks of 16 values for 16 values and more, or value by value
in float64 for fewer. Equal up to the rounding of log, sin and cos in float32.
"""

import math

import numpy as np
from jaxtyping import Float32, UInt32

_BLOCK = 16
_HALF = _BLOCK // 2


class TorchGenerator:
    """A stream of normal noise: `torch.Generator("cpu").manual_seed(seed)`.

    PyTorch seeds its Mersenne twister with the low 32 bits, so seeds that agree in them give the
    same noise.
    """

    def __init__(self, seed: int) -> None:
        bits = np.random.MT19937()
        bits._legacy_seeding(seed & 0xFFFFFFFF)  # init_genrand: the seeding that PyTorch uses
        self._bits = bits
        self._next_normal: float | None = None

    def randn(self, shape: tuple[int, ...]) -> Float32[np.ndarray, "*shape"]:
        """Standard normal noise, what `torch.randn(shape, generator=...)` draws next."""
        size = math.prod(shape)
        values = self._small(size) if size < _BLOCK else self._blocks(size)
        return values.reshape(shape)

    def _random(self, count: int) -> UInt32[np.ndarray, " count"]:
        return self._bits.random_raw(count).astype(np.uint32)

    def _uniform(self, count: int) -> Float32[np.ndarray, " count"]:
        return (self._random(count) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _blocks(self, size: int) -> Float32[np.ndarray, " size"]:
        values = self._uniform(size)
        whole = size - size % _BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole < size:  # the last 16 values are drawn again, overlapping the block before
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _small(self, size: int) -> Float32[np.ndarray, " size"]:
        return np.array([self._normal() for _ in range(size)], np.float32)

    def _normal(self) -> float:
        if self._next_normal is not None:
            value, self._next_normal = self._next_normal, None
            return value
        angle = 2.0 * math.pi * self._uniform_double()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform_double()))
        self._next_normal = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform_double(self) -> float:
        high, low = (int(value) for value in self._random(2))
        return ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53


def _box_muller(uniform: Float32[np.ndarray, " size"]) -> Float32[np.ndarray, " size"]:
    """Blocks of 16 uniform values -> 16 normal ones; pairs stand 8 apart."""
    pairs = uniform.reshape(-1, 2, _HALF)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    angle = np.float32(2.0 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
