"""A course of training that can be stopped at any moment and goes on where it stood."""

import json
import math
import os
import pickle
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.recipe.errors import RecipeError
from trainer.messages import first_line

# Where the learning rate begins to fall: a checkpoint is kept there, so that a longer course can
# go on from it at the full rate.
DECAY_FROM = 0.72
WARMUP_IMAGES = 12_800

_CHECKPOINT_EVERY_S = 120.0
_LOG_EVERY_S = 20.0
_EMA_DECAY = 0.999
_LOSS_MEMORY = 0.98  # of the running means that are logged


@dataclass(kw_only=True)
class Course:
    """Trains a module to a number of images, in as many sittings as it takes.

    The learning rate warms up, stays, and falls in a straight line to zero over the last part.
    An exponential moving average of the weights is what is used in the end.
    """

    path: Path  # the checkpoint
    module: nn.Module
    total_images: int
    batch_size: int
    rate: float
    device: torch.device
    deadline: float | None = None  # seconds of time.monotonic(); None: no limit
    warmup_images: int = WARMUP_IMAGES
    images: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.module.to(self.device)
        self.average = deepcopy(self.module).requires_grad_(False).eval()
        self._weights: list[Tensor] = list(self.module.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        self._means: dict[str, Tensor] = {}  # on the device: reading them would wait for it
        self._warm_from = 0  # images; the rate warms up from here
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._load()

    @property
    def done(self) -> bool:
        """Whether all images have been seen."""
        return self.images >= self.total_images

    @property
    def losses(self) -> dict[str, float]:
        """Running means of the loss and what was logged beside it.

        Errors:
            RecipeError: one is not finite; nothing more is saved, so the last checkpoint stands.
        """
        losses = {name: float(mean) for name, mean in self._means.items()}
        if wrong := {name: value for name, value in losses.items() if not math.isfinite(value)}:
            raise RecipeError(
                f"{self.path.stem}: after {self.images:,} images {wrong} is not finite; the last "
                "checkpoint stands: lower the rate in the settings and run again"
            )
        return losses

    def steps(self) -> Iterator[int]:
        """Yields the number of images seen, once a step, until done or out of time.

        The checkpoint is written every two minutes and at the end, also of an interrupted run.
        """
        saved_at = logged_at = time.monotonic()
        logged_images = self.images
        try:
            while not self.done:
                now = time.monotonic()
                if self.deadline is not None and now > self.deadline:
                    return
                if now - logged_at > _LOG_EVERY_S:
                    self._log((self.images - logged_images) / (now - logged_at))
                    logged_at, logged_images = now, self.images
                if now - saved_at > _CHECKPOINT_EVERY_S:
                    self.save()
                    saved_at = now
                yield self.images
        finally:
            self.save()

    def apply(self, loss: Tensor, **parts: Tensor) -> None:
        """One optimizer step on this loss; `parts` are logged beside it."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate * self.rate_factor(self.images)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        before = self.images
        self.images += self.batch_size
        self._update_average()
        self._note({"loss": loss, **parts})
        if before < DECAY_FROM * self.total_images <= self.images:
            self.save(self.path.with_suffix(".stable.pt"))

    def rate_factor(self, images: int) -> float:
        """The learning rate after this many images, as a share of its peak."""
        rising = min(1.0, (images - self._warm_from + self.batch_size) / self.warmup_images)
        left = 1 - images / self.total_images
        return rising * min(1.0, max(0.0, left / (1 - DECAY_FROM)))

    @torch.no_grad()
    def _update_average(self) -> None:
        steps = self.images / self.batch_size
        decay = min(_EMA_DECAY, (1 + steps) / (10 + steps))
        get_ema_multi_avg_fn(decay)(self._averages, self._weights, None)

    @torch.no_grad()
    def _note(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            mean = self._means.get(name, value)
            self._means[name] = torch.lerp(value, mean, _LOSS_MEMORY)

    def save(self, path: Path | None = None) -> None:
        """Writes the checkpoint in one piece: a kill leaves the old one or the new one.

        Errors:
            RecipeError: the loss is not finite, or the file cannot be written.
        """
        state = {
            "images": self.images,
            "losses": self.losses,
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        write_checkpoint(state, path or self.path)

    def _load(self) -> None:
        state = read_checkpoint(self.path, self.device)
        try:
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.images = int(state["images"])
            losses: dict[str, float] = state["losses"]
            # A state that travelled has none: the optimizer gathers its moments anew.
            if "optimizer" in state:
                self._optimizer.load_state_dict(state["optimizer"])
            else:
                self._warm_from = self.images
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{self.path} belongs to another model ({first_line(error)}); was it trained in "
                "this --setting? Else move it away, and its stage is trained anew"
            ) from error
        self._means = {name: torch.tensor(v, device=self.device) for name, v in losses.items()}

    def _log(self, images_per_s: float) -> None:
        losses = self.losses
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "images": self.images,
            "of": self.total_images,
            "images_per_s": round(images_per_s, 1),
            **{name: round(value, 5) for name, value in losses.items()},
        }
        with open(self.path.with_suffix(".log"), "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        left_min = (self.total_images - self.images) / max(images_per_s, 1e-9) / 60
        print(
            f"{self.path.stem}: {self.images:,} of {self.total_images:,} images, "
            f"{images_per_s:.0f}/s, {left_min:.0f} min left  "
            + "  ".join(f"{name} {value:.4f}" for name, value in losses.items()),
            flush=True,
        )


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes what `read_checkpoint` reads, in one piece.

    Errors:
        RecipeError: the disk is full, or the folder cannot be written to.
    """
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        partial.unlink(missing_ok=True)
        raise RecipeError(
            f"cannot write {path}: {first_line(error)}; an earlier checkpoint is as it was: "
            "make room on the disk and run again"
        ) from error


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state in a checkpoint; nothing but tensors and plain values is read.

    Errors:
        RecipeError: the file is cut off, or is no checkpoint.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise RecipeError(
            f"{path} is damaged or no checkpoint ({first_line(error)}); move it away to train its "
            f"stage anew, or put {path.stem}.stable.pt in its place if there is one"
        ) from error
    if not isinstance(state, dict):
        raise RecipeError(f"{path} holds a {type(state).__name__}, no checkpoint; move it away")
    return state
