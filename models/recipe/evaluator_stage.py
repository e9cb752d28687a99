"""The evaluator from icons to files: trained, exported, and told how accurate it is."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from models.recipe import icons
from models.recipe.accuracy import accuracy
from models.recipe.compositions import Composer
from models.recipe.evaluator import EXPOSURES, IMAGE_SIZE, EvaluatorNetwork, train_evaluator
from models.recipe.evaluator_files import export_evaluator, write_spec
from models.recipe.exam import Examiner, Share
from models.recipe.objects import HELD_OUT_OBJECTS, HELD_OUT_STYLE
from models.recipe.settings import Setting
from models.recipe.stages import HELD_OUT_INDEX
from trainer.evaluator import SPEC_FILE, Evaluator


def make_evaluator(
    setting: Setting,
    *,
    pack: Path,
    folder: Path,
    target: Path,
    device: torch.device,
    minutes: float | None = None,
    exposures: int = EXPOSURES,
) -> dict[str, Share] | None:
    """Goes on training in `folder`; once finished, writes `target` and returns its accuracy.

    It learns the setting's objects and the held-out ones, since it has to judge what no model has
    seen; the held-out style it never meets, which keeps share-alike out of its weights too.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    drawn = [
        icon
        for icon in icons.read_pack(pack, [*setting.slugs, *HELD_OUT_OBJECTS])
        if icon.style != HELD_OUT_STYLE
    ]
    composer = Composer(drawn, IMAGE_SIZE)
    course, tokenizer = train_evaluator(
        composer, folder / "evaluator.pt", device, deadline, exposures
    )
    if not course.done:
        return None
    assert isinstance(course.average, EvaluatorNetwork)
    held_out = {icon.noun for icon in drawn if icon.slug in HELD_OUT_OBJECTS}
    export_evaluator(
        course.average,
        tokenizer,
        target,
        nouns=composer.nouns,
        held_out_nouns=held_out,
        styles=composer.styles,
    )
    shares = accuracy(Examiner(Evaluator.open(target)), composer, HELD_OUT_INDEX)
    spec = json.loads((target / SPEC_FILE).read_text())
    write_spec(target, {**spec, "accuracy": {name: asdict(s) for name, s in shares.items()}})
    return shares
