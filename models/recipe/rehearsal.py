"""The whole recipe in toy size: icons, training, sheet, model, and the model in use."""

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from models.recipe import icons, sheets
from models.recipe.errors import RecipeError
from models.recipe.prompts import SHEET_PROMPTS
from models.recipe.settings import TOY
from models.recipe.stages import Recipe
from trainer.model import load_model

_PROMPT = SHEET_PROMPTS[0]
_FILE_LIMIT_BYTES = 16_000_000


def rehearse(work: Path) -> None:
    """Runs every stage anew, in toy size, and uses what comes out; says how long each part took.

    Errors:
        RecipeError: a stage failed, or what it made cannot be used.
    """
    recipe = Recipe(
        setting=TOY, folder=work / TOY.name, pack=work / "icons.zip", device=torch.device("cpu")
    )
    shutil.rmtree(recipe.folder, ignore_errors=True)
    if not recipe.pack.is_file():
        with _timed("icons"):
            icons.make_pack(recipe.pack, work / "npm")
    with _timed("training"):
        recipe.run()
    with _timed("sheet"):
        pictures = sheets.draw(recipe.pipeline(), SHEET_PROMPTS[:16], steps=10)
        sheets.save_sheet(pictures, recipe.folder / "sheet.png")
    with _timed("model"):
        recipe.export(recipe.folder / "model")
        _use(recipe.folder / "model")
    print(f"the recipe works: {recipe.folder / 'model'}, {recipe.folder / 'sheet.png'}")


def _use(model: Path) -> None:
    """Draws with the exported model, as a user of diffusers would, and loads it in the trainer."""
    large = [
        path
        for path in model.rglob("*")
        if path.is_file() and path.stat().st_size > _FILE_LIMIT_BYTES
    ]
    if large:
        raise RecipeError(f"files over {_FILE_LIMIT_BYTES:,} bytes: {', '.join(map(str, large))}")
    load_model(model)
    load: Any = StableDiffusionPipeline.from_pretrained
    pipeline = load(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture = sheets.draw(pipeline, [_PROMPT], steps=10)
    if np.ptp(picture) == 0:
        raise RecipeError(f"the model {model} draws nothing for {_PROMPT!r}")


@contextmanager
def _timed(part: str) -> Generator[None]:
    begun = time.monotonic()
    yield
    print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
