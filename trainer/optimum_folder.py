"""A Stable Diffusion that `optimum` exported to ONNX, as its folder describes it; no PyTorch."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from engine.errors import OneWordError
from engine.files import sha256_of_file
from trainer.clip_tokenizer import ClipTokenizer, read_clip_tokenizer
from trainer.onnx_surgery import FLOAT, interface

GRAPHS = {
    "text_encoder": "text_encoder",
    "denoiser": "unet",
    "vae_decoder": "vae_decoder",
    "vae_encoder": "vae_encoder",
}
SUPPORTED = "supported: Stable Diffusion 1.x and 2.x in float32 (`optimum-cli export onnx`)"
_PIPELINES = ("StableDiffusionPipeline", "ORTStableDiffusionPipeline")
# Keys of a UNet's config that ask for another input than latents, timestep and prompt.
_EXTRA_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class ImportRefused(OneWordError):
    """The folder is not what optimum exports, or not of a model that can be served from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimumFolder:
    """What its JSON files say; the graphs are read when they are changed."""

    path: Path
    text: dict[str, Any]  # text_encoder/config.json, as the others
    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    scheduler_class: str
    tokenizer: ClipTokenizer

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def channels(self) -> int:
        return int(self.unet["in_channels"])

    @property
    def max_tokens(self) -> int:
        return int(self.text["max_position_embeddings"])

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, each way."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """Heights and widths of latents must be multiples of this for the UNet's skips to meet."""
        return 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.get("scaling_factor", 0.18215))  # diffusers' default

    @property
    def shift_factor(self) -> float:
        return float(self.vae.get("shift_factor") or 0.0)

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler.get("prediction_type", "epsilon"))

    def graph_path(self, component: str) -> Path:
        return self.path / GRAPHS[component] / "model.onnx"

    def load_graph(self, component: str) -> onnx.ModelProto:
        """A graph with its weights; raises `ImportRefused` for one that is not float32."""
        path = self.graph_path(component)
        try:
            model = onnx.load(path)
        except Exception as error:  # protobuf and onnx have classes of their own
            raise ImportRefused(f"{path} cannot be read: {error}") from error
        kinds = {kind for kind, _ in interface(model.graph.output).values()}
        if kinds != {FLOAT}:
            raise ImportRefused(f"{path} does not give float32; {SUPPORTED}")
        return model

    def digest(self) -> str:
        """SHA-256 over the names and bytes of all that a bundle is made of."""
        digest = hashlib.sha256(json.dumps(self.scheduler, sort_keys=True).encode())
        for path in sorted(self._files()):
            name = path.relative_to(self.path).as_posix()
            digest.update(f"{name} {sha256_of_file(path)}\n".encode())
        return digest.hexdigest()

    def _files(self) -> Iterator[Path]:
        for folder in (*GRAPHS.values(), "tokenizer"):
            yield from (path for path in (self.path / folder).rglob("*") if path.is_file())


def read_optimum_folder(path: Path) -> OptimumFolder:
    """Read what a folder says of itself; raises `ImportRefused` or `TokenizerUnreadable`."""
    path = path.resolve()
    index = _read_json(path / "model_index.json", "is this a folder that optimum has written?")
    if (kind := index.get("_class_name")) not in _PIPELINES:
        raise ImportRefused(f"{path} is a {kind}; {SUPPORTED}")
    for component in GRAPHS:
        file = path / GRAPHS[component] / "model.onnx"
        if not file.is_file():
            raise ImportRefused(f"{file} is missing; export the model with optimum again")
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json")
    listed = index.get("scheduler") or [None, scheduler.get("_class_name")]
    folder = OptimumFolder(
        path=path,
        text=_read_json(path / "text_encoder" / "config.json"),
        unet=_read_json(path / "unet" / "config.json"),
        vae=_read_json(path / "vae_decoder" / "config.json"),
        scheduler=scheduler,
        scheduler_class=str(listed[1]),
        tokenizer=read_clip_tokenizer(path / "tokenizer"),
    )
    _check(folder)
    return folder


def _check(folder: OptimumFolder) -> None:
    """Refuse models that want more than latents, a timestep and one prompt."""
    unet = folder.unet
    extra = [f"{key}={unet[key]!r}" for key in _EXTRA_INPUTS if unet.get(key) is not None]
    if extra:
        raise ImportRefused(f"{folder.path}: the UNet has {', '.join(extra)}; {SUPPORTED}")
    channels = (unet["in_channels"], unet["out_channels"])
    if channels != (folder.vae["latent_channels"],) * 2:
        raise ImportRefused(
            f"{folder.path}: the UNet takes {channels[0]} channels and gives {channels[1]}, the "
            f"VAE's latents have {folder.vae['latent_channels']}; {SUPPORTED}"
        )
    if folder.prediction_type not in ("epsilon", "v_prediction"):
        raise ImportRefused(
            f"{folder.path}: the scheduler has prediction_type {folder.prediction_type!r}; "
            "supported: epsilon, v_prediction"
        )
    words = folder.tokenizer.tokenizer.get_vocab_size()
    if words != folder.text["vocab_size"]:
        raise ImportRefused(
            f"{folder.path}: the tokenizer has {words} tokens, the text encoder's table "
            f"{folder.text['vocab_size']} rows"
        )


def _read_json(path: Path, hint: str = "export the model with optimum again") -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ImportRefused(f"{path} cannot be read: {error.strerror}; {hint}") from error
    except ValueError as error:
        raise ImportRefused(f"{path} is not JSON: {error}; {hint}") from error
    if not isinstance(found, dict):
        raise ImportRefused(f"{path} is a JSON {type(found).__name__}, no object; {hint}")
    return found
