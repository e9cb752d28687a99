"""One word, learned by one of the settings and judged."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.learning import peer
from benchmarks.learning.judge import Judge, Judgement
from benchmarks.learning.settings import PEER, SETTINGS, independent_timesteps
from trainer.learning import learn
from trainer.options import LearnOptions
from trainer.quiet import quiet_libraries

# After these steps of the script the judge's loss is taken of its vectors.
PEER_STEPS = (100, 300, 1000, 2000, 3000)
_COURSE_POINTS = 4  # of our runs, beside the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A word with its judgement, and how it came to be."""

    setting: str
    concept: str  # name of its folder
    seed: int
    rows: int  # samples that went through the denoiser with a gradient
    judgement: Judgement
    course: tuple[tuple[int, float], ...]  # rows so far, and the judge's loss

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.setting, self.concept, self.seed)


def measure(setting: str, concept: str, seed: int) -> Measured:
    """Learn one word by a setting, or by the script, and judge what it draws."""
    torch.set_num_threads(1)
    quiet_libraries()
    if setting == PEER:
        found = _by_script(Judge(concept), seed)
    else:
        found = _by_us(Judge(concept, SETTINGS[setting].precision), setting, seed)
    return Measured(setting=setting, concept=concept, seed=seed, **found)


def _by_us(judge: Judge, setting: str, seed: int) -> dict[str, Any]:
    told = SETTINGS[setting]
    coarse = {"initializer_token": peer.INITIALIZERS[judge.concept]} if told.coarse_word else {}
    fields: dict[str, Any] = {"seed": seed, **coarse, **told.options}
    options = LearnOptions(**fields)
    with contextlib.nullcontext() if told.stratified else independent_timesteps():
        evaluated = [
            state
            for state in learn(judge.learner, judge.images, options)
            if state.evaluation_loss is not None
        ]
    last = evaluated[-1]
    return {
        "rows": last.step * options.batch_size,
        "judgement": judge.judge(last.best_vectors),
        "course": tuple(
            (state.step * options.batch_size, round(judge.loss(state.vectors), 5))
            for state in evaluated[:: max(1, (len(evaluated) - 1) // _COURSE_POINTS)]
        ),
    }


def _by_script(judge: Judge, seed: int) -> dict[str, Any]:
    run = peer.run(judge.concept, seed)
    return {
        "rows": peer.STEPS * peer.ACCUMULATION,
        "judgement": judge.judge(run.vectors()),
        "course": tuple(
            (step * peer.ACCUMULATION, round(judge.loss(run.vectors(step)), 5))
            for step in PEER_STEPS
        ),
    }


def as_json(measured: Measured) -> dict[str, Any]:
    return dataclasses.asdict(measured)


def from_json(stored: dict[str, Any]) -> Measured:
    """Of `as_json`; raises TypeError for other fields."""
    judgement = Judgement(**stored["judgement"])
    course = tuple((rows, loss) for rows, loss in stored["course"])
    fields: dict[str, Any] = {**stored, "judgement": judgement, "course": course}
    return Measured(**fields)
