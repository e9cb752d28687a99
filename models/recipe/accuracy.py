"""How well the evaluator reads composed pictures that it has not seen."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32

from engine.requests import RgbImage
from models.recipe.compositions import Composer, Composition
from models.recipe.exam import Examiner, Question, Share, question_of
from models.recipe.lessons import augmented
from models.recipe.pictures import to_tensor

NUM_PICTURES, NUM_CAPTIONS = 3_000, 512


def accuracy(examiner: Examiner, composer: Composer, first_index: int) -> dict[str, Share]:
    """Shares of right answers on the compositions from `first_index` on, by what was asked."""
    compositions = [composer.compose(first_index + place) for place in range(NUM_PICTURES)]
    # Two or three of one thing are neither one object nor a pair.
    compositions = [c for c in compositions if c.shown[0].count == 1]
    questions = [question_of(composition) for composition in compositions]
    marks = examiner.marks([question.picture for question in questions], questions)
    soft = examiner.marks(_softened(compositions), questions)
    return {
        **marks,
        **{f"{name}, soft pictures": share for name, share in soft.items()},
        **_held_out(examiner, questions),
        **_recall(examiner, compositions[:NUM_CAPTIONS]),
    }


def _softened(compositions: Sequence[Composition]) -> list[RgbImage]:
    """The pictures blurred, moved and noisy, as in the training."""
    rng = np.random.default_rng(5)
    pixels = to_tensor(np.stack([c.pixels for c in compositions]), torch.device("cpu"))
    torch.manual_seed(5)
    levels = (augmented(pixels, rng) + 1) * 127.5
    return list(levels.permute(0, 2, 3, 1).round().byte().numpy())


def _held_out(examiner: Examiner, questions: Sequence[Question]) -> dict[str, Share]:
    """The objects that no model is trained on: among all nouns, and told apart among themselves."""
    held_out = examiner.evaluator.spec.held_out_nouns
    asked = [q for q in questions if len(q.nouns) == 1 and q.nouns[0] in held_out]
    pictures = [question.picture for question in asked]
    columns = [examiner.nouns.index(noun) for noun in held_out]
    logits = examiner.noun_logits(examiner.evaluator.image_embeds(pictures))[:, columns]
    named = [held_out[place] for place in logits.argmax(axis=1)]
    return {
        "held-out object, among all": examiner.marks(pictures, asked)["object"],
        "held-out object, among these": Share(
            sum(name == q.nouns[0] for name, q in zip(named, asked, strict=True)), len(asked)
        ),
    }


def _recall(examiner: Examiner, compositions: Sequence[Composition]) -> dict[str, Share]:
    """Recall@1 of the caption by the picture, and the other way round."""
    evaluator, captions = examiner.evaluator, [c.caption for c in compositions]
    images = evaluator.image_embeds([c.pixels for c in compositions])
    cosines = images @ evaluator.text_embeds(captions).T
    return {
        f"caption of a picture, among {len(captions)}": _first(cosines, captions),
        f"picture of a caption, among {len(captions)}": _first(cosines.T, captions),
    }


def _first(cosines: Float32[np.ndarray, "asked found"], captions: list[str]) -> Share:
    best = cosines.argmax(axis=1)
    hits = sum(captions[place] == caption for place, caption in zip(best, captions, strict=True))
    return Share(hits, len(captions))
