"""In which precision the denoiser runs while words are learned; the vectors are float32 always."""

from typing import Literal

import torch

from trainer.errors import LearningError

Precision = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def unet_dtype(precision: Precision, device: str) -> torch.dtype:
    """The dtype that is meant. `auto`: bfloat16 on an NVIDIA GPU that computes in it, else float32.

    bfloat16 has the range of float32, so nothing overflows. float16 is for GPUs without it. On a
    CPU float32 is the default, so that a word does not depend on the make of the processor.
    Raises `LearningError` for another name.
    """
    if precision == "auto":
        fast = device.startswith("cuda") and torch.cuda.is_available()
        return torch.bfloat16 if fast and torch.cuda.is_bf16_supported(False) else torch.float32
    if precision not in _DTYPES:
        raise LearningError(f"precision must be auto, {', '.join(_DTYPES)}, got {precision!r}")
    return _DTYPES[precision]
