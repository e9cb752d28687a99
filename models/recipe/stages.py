"""The recipe from icons to model, stage by stage; each stage takes up what the last one left.

    icons -> autoencoder -> tokenizer -> latents -> denoiser -> model

Everything lies in one work folder: delete a file to make its stage anew.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from transformers import CLIPTokenizer

from engine.staging import staged_folder
from models.recipe import icons
from models.recipe.autoencoder import normalized, train_autoencoder
from models.recipe.compositions import Composer
from models.recipe.courses import Course, read_checkpoint
from models.recipe.denoiser import Denoiser, new_sampler, train_denoiser
from models.recipe.errors import RecipeError
from models.recipe.latents import LatentPool
from models.recipe.objects import HELD_OUT_OBJECTS, TRAINING_STYLES
from models.recipe.pictures import composed_batches, to_tensor
from models.recipe.settings import Setting
from models.recipe.tokens import new_tokenizer
from trainer.messages import first_line

# Above every index that a training of any setting reaches: pictures that no training has seen.
HELD_OUT_INDEX = 1 << 30
_NORMALIZED_ON = 16  # batches
# No file of the model is larger: what git hosts and code reviews still take without complaint.
SHARD_SIZE = "15MB"
_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One setting at work in one folder."""

    setting: Setting
    folder: Path
    pack: Path
    device: torch.device

    def composer(self, every_object: bool = False) -> Composer:
        """Compositions of the setting's objects, or of all that are not held out."""
        packed = icons.read_pack(self.pack, None if every_object else self.setting.slugs)
        return Composer(for_training(packed), self.setting.image_size)

    def run(self, minutes: float | None = None) -> bool:
        """Goes on from where the recipe stands; returns whether the model is finished."""
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        if not (self.folder / "vae").is_dir() and not self._autoencoder(deadline).done:
            return False
        return self._denoiser(deadline).done

    def _autoencoder(self, deadline: float | None) -> Course:
        # The autoencoder gains from every object there is, also when few are named.
        composer = self.composer(every_object=True)
        path = self.folder / "autoencoder.pt"
        course = train_autoencoder(self.setting, composer, path, self.device, deadline)
        if course.done:
            held_out = composed_batches(composer, 64, HELD_OUT_INDEX, self.device)
            batches = [to_tensor(next(held_out).pixels, self.device) for _ in range(_NORMALIZED_ON)]
            average: Any = course.average
            # Latents of an autoencoder that this one replaces are of no use.
            shutil.rmtree(self.folder / "latents", ignore_errors=True)
            _save_whole(normalized(average, batches).cpu(), self.folder / "vae")
        return course

    def _denoiser(self, deadline: float | None) -> Course:
        composer = self.composer()
        tokenizer = self._tokenizer(composer)
        vae: Any = self.vae()
        pool = LatentPool(
            self.setting,
            self.folder / "latents",
            composer,
            vae.to(self.device),
            tokenizer,
            self.device,
        )
        path = self.folder / "denoiser.pt"
        return train_denoiser(self.setting, tokenizer, pool, path, self.device, deadline)

    def _tokenizer(self, composer: Composer) -> CLIPTokenizer:
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            packed = icons.read_pack(self.pack)
            named = {icon.noun for icon in packed if icon.slug not in HELD_OUT_OBJECTS}
            _save_whole(new_tokenizer(self.setting, composer, named), folder)
        return self.tokenizer()

    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer that the denoiser was trained with."""
        return _loaded(CLIPTokenizer.from_pretrained, self.folder / "tokenizer")

    def vae(self) -> AutoencoderKL:
        """The trained autoencoder, in float32."""
        vae: Any = _loaded(AutoencoderKL.from_pretrained, self.folder / "vae")
        return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def pipeline(self) -> StableDiffusionPipeline:
        """The model as it stands, finished or not, in float32.

        Errors:
            RecipeError: no denoiser has been trained yet.
        """
        path = self.folder / "denoiser.pt"
        if not path.is_file():
            raise RecipeError(
                f"there is no denoiser in {self.folder} yet; run: python -m models.recipe train "
                f"--setting {self.setting.name}"
            )
        tokenizer = self.tokenizer()
        denoiser = Denoiser(self.setting, tokenizer)
        state = read_checkpoint(path, torch.device("cpu"))
        try:
            denoiser.load_state_dict(state["average"])
        except (RuntimeError, KeyError) as error:
            raise RecipeError(
                f"{path} is of another setting than {self.setting.name!r}: {first_line(error)}"
            ) from error
        denoiser.eval().requires_grad_(False)
        make: Any = StableDiffusionPipeline
        pipeline = make(
            vae=self.vae(),
            text_encoder=denoiser.text_encoder,
            tokenizer=tokenizer,
            unet=denoiser.unet,
            scheduler=new_sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def export(self, target: Path, shard_size: str = SHARD_SIZE) -> None:
        """Writes the model in the diffusers layout, float16, in place of what is at `target`.

        Other files there (a model card) stay.

        Errors:
            RecipeError: there is no model yet, or the folder cannot be written.
        """
        pipeline: Any = self.pipeline()
        staging = target.with_name(target.name + ".partial")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            pipeline.to(dtype=torch.float16).save_pretrained(staging, max_shard_size=shard_size)
            _let_load_as_float32(staging / "text_encoder" / "config.json")
            _forget_origin(staging / "vae" / "config.json")
            target.mkdir(parents=True, exist_ok=True)
            for part in _PARTS:
                shutil.rmtree(target / part, ignore_errors=True)
                (staging / part).rename(target / part)
            (staging / "model_index.json").replace(target / "model_index.json")
        except OSError as error:
            raise RecipeError(f"cannot write the model {target}: {first_line(error)}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def for_training(packed: list[icons.Icon]) -> list[icons.Icon]:
    """The icons that a training may see: no held-out object, no held-out style."""
    return [
        icon
        for icon in packed
        if icon.style in TRAINING_STYLES and icon.slug not in HELD_OUT_OBJECTS
    ]


def _loaded(load: Callable[[Path], _T], folder: Path) -> _T:
    if not folder.is_dir():
        raise RecipeError(f"there is no {folder} yet; run: python -m models.recipe train")
    try:
        return load(folder)
    except Exception as error:  # OSError, SafetensorError, and tokenizers' bare Exception
        raise RecipeError(
            f"cannot read {folder} ({first_line(error)}); delete it, it is made anew"
        ) from error


def _let_load_as_float32(config: Path) -> None:
    """diffusers loads float16 files as float32 unless told otherwise, transformers as they are.

    A pipeline loaded without `torch_dtype` would have a text encoder that its UNet cannot read.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(content | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _forget_origin(config: Path) -> None:
    """Without the folder of the machine that it was trained on."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save_whole(module: AutoencoderKL | CLIPTokenizer, folder: Path) -> None:
    """`save_pretrained`, but a kill leaves no half-written folder."""
    try:
        with staged_folder(folder) as staging:
            module.save_pretrained(staging)
    except Exception as error:  # OSError, or the libraries' own for a full disk
        raise RecipeError(f"cannot write {folder}: {first_line(error)}") from error
