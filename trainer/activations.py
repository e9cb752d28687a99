"""How large numbers become inside a network: whether float16 has room for them.

That a half graph gives the right numbers in ONNX Runtime on the CPU, on random inputs, does not say
so: another device rounds in other places, other inputs reach further. So what the float32 module
computes is looked at, operator by operator.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Float16 ends at 65504. The gate's inputs are random: what users draw may reach further, so a
# component must stay below a quarter of that.
FLOAT16_MAX = 65504.0
HEADROOM = 4.0


@dataclass(frozen=True, slots=True)
class LargestActivation:
    """The largest magnitude of any result inside a network, and the module that computed it."""

    value: float
    module: str

    @property
    def fits_float16(self) -> bool:
        return self.value <= FLOAT16_MAX / HEADROOM  # not so NaN

    def __str__(self) -> str:
        return f"{self.value:.3g} in {self.module or 'the graph'}"


class _Recorder(TorchDispatchMode):
    """Sees the result of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.largest = LargestActivation(0.0, "")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.name():
            self._see(_largest_score(args[0], args[1]))
        if not func.is_view:
            for result in tree_leaves(results):
                if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
                    self._see(_magnitude(result))
        return results

    def _see(self, value: float) -> None:
        if not value <= self.largest.value:  # also NaN
            self.largest = LargestActivation(value, self.path[-1] if self.path else "")


def _magnitude(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(-low, high))


def _largest_score(query: Tensor, key: Tensor) -> float:
    """A bound for attention's scores, which the exported graph computes (Cauchy-Schwarz)."""
    product = query.norm(dim=-1).max() * key.norm(dim=-1).max()
    return float(product) / query.shape[-1] ** 0.5


@contextmanager
def largest_activation(module: nn.Module) -> Generator[Callable[[], LargestActivation]]:
    """Look at everything that a module computes in the block; the function says what was found."""
    recorder = _Recorder()
    handles = [
        handle
        for path, part in module.named_modules()
        for handle in (
            part.register_forward_pre_hook(lambda *_, path=path: recorder.path.append(path)),
            part.register_forward_hook(lambda *_: (recorder.path.pop(), None)[1], always_call=True),
        )
    ]
    try:
        with recorder:
            yield lambda: recorder.largest
    finally:
        for handle in handles:
            handle.remove()
