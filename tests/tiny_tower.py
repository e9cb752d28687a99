"""CLIPs with random weights whose text half is a text encoder of a tiny model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from trainer.model import DiffusionModel

SIDE = 24  # pixels that the tiny towers see
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}


def make_tiny_tower(
    folder: Path,
    model: DiffusionModel,
    *,
    encoder: int = 0,
    more_layers: int = 0,
    dtype: torch.dtype = torch.float32,
    **text_options: Any,
) -> Path:
    """Save a folder that `CLIPModel.from_pretrained` loads; returns it.

    `more_layers` stand behind the last one of the model's text encoder, `text_options` change its
    config, and the weights are rounded to `dtype`.
    """
    one = model.encoders[encoder]
    text: Any = one.text_encoder
    config = text.config.to_dict() | text_options
    config["num_hidden_layers"] += more_layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        make: Any = CLIPModel
        clip = make(
            CLIPConfig(
                text_config=config,
                vision_config=_VISION,
                projection_dim=config["projection_dim"] if encoder else 12,
            )
        )
    if not text_options:
        weights = getattr(text, "text_model", text).state_dict()
        clip.text_model.load_state_dict(weights, strict=not more_layers)
    if hasattr(text, "text_projection"):
        clip.text_projection.load_state_dict(text.text_projection.state_dict())
    clip.to(dtype).save_pretrained(folder)
    one.tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSING))
    return folder


_PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "do_convert_rgb": True,
}


def load_clip(folder: Path) -> Any:
    """The CLIP of such a folder as transformers loads it."""
    load: Any = CLIPModel.from_pretrained
    return load(folder).eval()
