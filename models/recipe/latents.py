"""Compositions encoded once: what the denoiser is trained on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float16, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from models.recipe.compositions import Composer
from models.recipe.devices import autocast
from models.recipe.errors import RecipeError
from models.recipe.pictures import Batch, composed_batches, to_tensor
from models.recipe.settings import Setting
from trainer.messages import first_line

_CHUNK_IMAGES = 4_096
_ENCODED_AT_ONCE = 64
# A composition comes back about so many times, each time with other noise.
_REUSE = 5
_FIRST_CHUNKS = 4  # before the training begins


class LatentPool:
    """Latents and token ids of compositions, in chunk files that are made when they are needed.

    All of them lie in two tensors on the device, so that a batch is one gather.
    """

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        composer: Composer,
        autoencoder: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        device: torch.device,
    ) -> None:
        self._setting, self._folder, self._composer = setting, folder, composer
        self._autoencoder: Any = autoencoder
        self._tokenizer, self._device = tokenizer, device
        self._chunk_images = min(_CHUNK_IMAGES, setting.pool_images)
        self._chunks = 0
        self._batches: Iterator[Batch] = iter(())
        self._next_image: int | None = None  # where `_batches` stands
        rows = -(-setting.pool_images // self._chunk_images) * self._chunk_images
        self._latents = torch.empty(rows, *self._latent_shape, dtype=torch.half, device=device)
        self._ids = torch.empty(rows, setting.max_tokens, dtype=torch.int64, device=device)
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self._chunks * self._chunk_images

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = self._setting.latent_size
        return (self._setting.latent_channels, side, side)

    def grow_for(self, images_seen: int) -> None:
        """Encodes more compositions if this many images of training need more.

        Errors:
            RecipeError: a chunk file is damaged or of another setting, or the disk is full.
        """
        wanted = _FIRST_CHUNKS * self._chunk_images + images_seen // _REUSE
        while len(self) < min(self._setting.pool_images, wanted):
            self._add()

    def draw(
        self, batch_size: int, rng: np.random.Generator
    ) -> tuple[Float16[Tensor, "batch channels height width"], Int64[Tensor, "batch tokens"]]:
        """A batch of latents and token ids, each with equal chance."""
        chunks = rng.integers(0, self._chunks, batch_size)
        places = rng.integers(0, self._chunk_images, batch_size)
        rows = torch.from_numpy(chunks * self._chunk_images + places).to(self._device)
        return self._latents[rows], self._ids[rows]

    def _add(self) -> None:
        path = self._folder / f"{self._chunks:04d}.safetensors"
        if not path.is_file():
            self._write(path, self._encoded(len(self)))
        stored = self._read(path)
        rows = slice(len(self), len(self) + self._chunk_images)
        self._latents[rows] = stored["latents"].to(self._device)
        self._ids[rows] = stored["input_ids"].to(self._device)
        self._chunks += 1

    def _write(self, path: Path, chunk: dict[str, Tensor]) -> None:
        partial = path.with_suffix(".partial")
        try:
            save_file(chunk, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise RecipeError(
                f"cannot write {path}: {first_line(error)}; make room on the disk and run again"
            ) from error

    def _read(self, path: Path) -> dict[str, Tensor]:
        remedy = f"delete {path}, it is made anew"
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise RecipeError(f"{path} is damaged ({first_line(error)}); {remedy}") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        expected = {
            "latents": (self._chunk_images, *self._latent_shape),
            "input_ids": (self._chunk_images, self._setting.max_tokens),
        }
        if shapes != expected:
            raise RecipeError(f"{path} holds {shapes}, expected {expected}; {remedy}")
        return stored

    @torch.no_grad()
    def _encoded(self, first: int) -> dict[str, Tensor]:
        latents: list[Tensor] = []
        ids: list[Tensor] = []
        batches = self._batches_from(first)
        for _ in range(self._chunk_images // _ENCODED_AT_ONCE):
            batch = next(batches)
            with autocast(self._device):
                posterior = self._autoencoder.encode(to_tensor(batch.pixels, self._device))
            latents.append(posterior.latent_dist.mean.half().cpu())
            ids.append(
                self._tokenizer(
                    batch.captions, padding="max_length", truncation=True, return_tensors="pt"
                ).input_ids.short()
            )
        return {
            "latents": torch.cat(latents).contiguous(),
            "input_ids": torch.cat(ids).contiguous(),
        }

    def _batches_from(self, first: int) -> Iterator[Batch]:
        """The compositions from `first` on; workers compose the next chunk during the training."""
        if first != self._next_image:
            self._batches = composed_batches(self._composer, _ENCODED_AT_ONCE, first, self._device)
        self._next_image = first + self._chunk_images
        return self._batches
