"""The device that a stage runs on, and what makes it fast there."""

import torch
from torch import nn

from models.recipe.errors import RecipeError
from trainer.messages import first_line

_KINDS = ("cpu", "cuda")


def open_device(name: str) -> torch.device:
    """The device of this name, ready for use.

    Errors:
        RecipeError: there is no such device here.
    """
    try:
        device = torch.device(name)
        if device.type in _KINDS:
            torch.empty(1, device=device)
    # torch built without CUDA raises AssertionError, or ValueError since 2.12
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RecipeError(
            f"device {name!r} cannot be used here ({first_line(error)}); try --device cpu"
        ) from error
    if device.type not in _KINDS:
        raise RecipeError(f"device {name!r} is not supported; choose of: {', '.join(_KINDS)}")
    if device.type == "cuda":
        # The convolutions run in bfloat16; this is for what autocast leaves in float32.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return device


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products and convolutions in bfloat16: no loss scaling is needed on any device."""
    return torch.autocast(device.type, torch.bfloat16)


def compile_on_gpu(device: torch.device, *modules: nn.Module) -> None:
    """Fuses the small operations between convolutions; TORCHDYNAMO_DISABLE=1 switches it off.

    Not on a CPU: compiling takes longer there than it saves. Compiled in place, so the names in
    checkpoints stay.
    """
    if device.type == "cuda":
        for module in modules:
            module.compile(dynamic=False)
