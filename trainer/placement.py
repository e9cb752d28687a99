"""Where a model computes: moved to a device as a whole, or refused in words."""

import shlex

import torch

from trainer.errors import LearningError
from trainer.messages import first_line
from trainer.model import DiffusionModel


def place(model: DiffusionModel, device: str | torch.device) -> DiffusionModel:
    """Move all networks of a model to a device, by PyTorch's name; returns the model.

    Errors:
        LearningError: PyTorch has no such device here, or it has no room; its cause says which.
    """
    try:
        target = torch.device(device)
        torch.ones(1, device=target).add(1).item()  # `meta` takes weights, but computes nothing
        for module in model.modules.values():
            module.to(target)
    # An unknown name, PyTorch without it (ValueError since 2.12), or a device whose own package
    # is missing.
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        raise LearningError(
            f"cannot use the device {shlex.quote(str(device))}: {first_line(error)}; name one "
            f"that is here: {', '.join(usable_devices())}"
        ) from error
    return model


def usable_devices() -> list[str]:
    """The devices that this PyTorch can compute on, the CPU first."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return ["cpu"]
    return ["cpu", *(f"{found.type}:{index}" for index in range(torch.accelerator.device_count()))]
