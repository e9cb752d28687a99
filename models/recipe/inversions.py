"""Words learned for objects that the model has never seen: how faithful, how editable."""

import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from tqdm import tqdm

from engine.concepts import Concept
from engine.requests import RgbImage
from engine.sessions import usable_cores
from models.recipe.exam import Examiner, Share
from models.recipe.objects import COLOURS, with_article
from trainer.evaluator import ImageEmbeds, mean_similarity
from trainer.images import read_images
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions
from trainer.placement import place
from trainer.quiet import quiet_libraries
from trainer.sampling import image_size, sample_images
from trainer.splicing import text_spec

STEPS, GUIDANCE_SCALE = 25, 4.0
NEUTRAL_PROMPTS = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a rendering of {}",
    "an illustration of {}",
    "a drawing of {}",
    "a close-up photo of {}",
    "a good photo of {}",
)
COLOUR_PROMPTS = tuple(f"{{}} on a {colour} background" for colour in COLOURS)
_NOUN_PROMPTS = NEUTRAL_PROMPTS[:4]  # every known noun is drawn with these
_NOUNS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """A word as the default trainer learned it."""

    name: str  # of the folder
    vectors: Float32[np.ndarray, "num_vectors dim"]
    initial_loss: float
    best_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Inversion:
    """What a learned word draws, beside the known word whose pictures are nearest."""

    name: str
    similarity: float  # mean cosine of its neutral pictures to the images it was learned from
    nearest_noun: str
    nearest_similarity: float  # the same of that noun's pictures, before anything was learned
    colours: Share  # plain backgrounds obeyed
    named: Share  # neutral pictures that the evaluator calls by the object's own noun
    initial_loss: float
    best_loss: float
    shown: tuple[RgbImage, ...]  # two that it was learned from, then drawn ones

    @property
    def above_nearest(self) -> bool:
        """Whether learning gave what no known word gives."""
        return self.similarity > self.nearest_similarity


def learn_all(model: Path, folders: Sequence[Path], device: torch.device) -> list[Learned]:
    """A word for each folder of images, by the trainer's defaults.

    On a CPU one process a core, each on a single thread: graphs this small gain nothing from two.
    """
    count = len(folders)
    jobs = (_learn, [model] * count, folders, [device] * count)
    bar = functools.partial(tqdm, total=count, desc="learning", unit="word")
    if device.type != "cpu":
        return list(bar(map(*jobs)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), context, _single_thread) as pool:
        return list(bar(pool.map(*jobs)))


def _single_thread() -> None:
    torch.set_num_threads(1)


def _learn(model: Path, folder: Path, device: torch.device) -> Learned:
    loaded = on_device(model, device)
    images = read_images(folder, size=image_size(loaded))
    *_, state = learn(loaded, images, LearnOptions())
    return Learned(
        name=folder.name,
        vectors=state.best_vectors.numpy(),
        initial_loss=state.initial_evaluation_loss,
        best_loss=state.best_evaluation_loss,
    )


def on_device(model: Path, device: torch.device) -> DiffusionModel:
    """The model as the trainer reads it, on a device."""
    quiet_libraries()
    return place(load_model(model), device)


def judge_all(
    model: DiffusionModel,
    learned: Sequence[Learned],
    folders: Sequence[Path],
    nouns: Sequence[str],
    examiner: Examiner,
) -> list[Inversion]:
    """Draws every learned word and every known noun, and compares them."""
    drawn_nouns = {
        noun: examiner.evaluator.image_embeds(pictures)
        for noun, pictures in _draw_nouns(model, nouns)
    }
    return [
        judge(_draw_word(model, word), word, read_levels(folder, image_size(model)), drawn_nouns,
              examiner)
        for word, folder in zip(tqdm(learned, desc="judging", unit="word"), folders, strict=True)
    ]  # fmt: skip


def judge(
    drawn: Sequence[RgbImage],
    word: Learned,
    images: Sequence[RgbImage],
    drawn_nouns: dict[str, ImageEmbeds],
    examiner: Examiner,
) -> Inversion:
    """Compares pictures of `NEUTRAL_PROMPTS` and `COLOUR_PROMPTS` with what was learned from."""
    references = examiner.evaluator.image_embeds(images)
    embeds = examiner.evaluator.image_embeds(drawn)
    neutral, coloured = np.split(embeds, [len(NEUTRAL_PROMPTS)])
    similar = {noun: mean_similarity(of, references) for noun, of in drawn_nouns.items()}
    nearest = max(similar, key=lambda noun: similar[noun])
    found = examiner.colours_found(coloured)
    names = [examiner.nouns[place] for place in examiner.noun_logits(neutral).argmax(axis=1)]
    return Inversion(
        name=word.name,
        similarity=mean_similarity(neutral, references),
        nearest_noun=nearest,
        nearest_similarity=similar[nearest],
        colours=Share(sum(a == b for a, b in zip(found, COLOURS, strict=True)), len(found)),
        named=Share(names.count(word.name.replace("-", " ")), len(names)),
        initial_loss=word.initial_loss,
        best_loss=word.best_loss,
        shown=(*images[:2], *drawn[:4], *drawn[len(NEUTRAL_PROMPTS) :][:10]),
    )


def read_levels(folder: Path, size: int) -> list[RgbImage]:
    """The images of a concept as the trainer crops them, in levels from 0 to 255."""
    levels = (read_images(folder, size=size).pixels + 1) * 127.5
    return list(levels.permute(0, 2, 3, 1).round().byte().numpy())


def _draw_word(model: DiffusionModel, word: Learned) -> list[RgbImage]:
    concept = Concept(placeholder_token=f"<{word.name}>", learned_embeddings=word.vectors)
    prompts = (*NEUTRAL_PROMPTS, *COLOUR_PROMPTS)
    return _draw(model, concept, [prompt.format(concept.placeholder_token) for prompt in prompts])


def _draw_nouns(
    model: DiffusionModel, nouns: Sequence[str]
) -> Iterator[tuple[str, list[RgbImage]]]:
    # The sampler wants a concept; no prompt holds its token.
    nothing = Concept(
        placeholder_token="<nothing>",
        learned_embeddings=np.zeros((1, text_spec(model).dim), np.float32),
    )
    each = len(_NOUN_PROMPTS)
    with tqdm(total=len(nouns), desc="drawing known nouns", unit="noun") as bar:
        for first in range(0, len(nouns), _NOUNS_AT_ONCE):
            group = nouns[first : first + _NOUNS_AT_ONCE]
            prompts = [p.format(with_article(noun)) for noun in group for p in _NOUN_PROMPTS]
            pictures = _draw(model, nothing, prompts)
            for place, noun in enumerate(group):
                yield noun, pictures[place * each : (place + 1) * each]
            bar.update(len(group))


def _draw(model: DiffusionModel, concept: Concept, prompts: list[str]) -> list[RgbImage]:
    pictures = sample_images(
        model,
        [concept],
        prompts,
        size=image_size(model),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
    )
    return [np.asarray(picture) for picture in pictures]
