"""Lessons of the evaluator: pictures as a diffusion model would draw them, sentences, truths."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from models.recipe.compositions import Composer, Composition
from models.recipe.pictures import to_tensor
from models.recipe.truths import (
    BACKGROUNDS,
    TRUE,
    Query,
    altered_query,
    background_query,
    caption_query,
    noun_query,
    partial_query,
    rephrased,
    style_query,
    truth_matrix,
)

BATCH_SIZE = 64
MAX_TOKENS = 32
_VOCABULARY_SIZE = 2048
_CORPUS_COMPOSITIONS = 6_000
_NOUNS_ASKED = 96  # of all, those that are shown among them
_PICTURES_TOLD = 24  # of a batch: in part, wrongly, and as the caption tells them
_PAD = "[PAD]"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Sentences as the text encoder takes them."""

    input_ids: Int64[Tensor, "sentences tokens"]
    attention_mask: Int64[Tensor, "sentences tokens"]  # 1 for tokens, 0 for padding

    def to(self, device: torch.device) -> "Tokens":
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device))


@dataclass(frozen=True, slots=True)
class Lesson:
    """A batch of pictures, sentences, and what is true."""

    pixels: Float[Tensor, "images 3 height width"]
    sentences: tuple[
        Tokens, ...
    ]  # the short ones and the long ones, so that few tokens are padding
    truths: Float[Tensor, "images sentences"]  # TRUE, FALSE or UNKNOWN
    choices: tuple[slice, ...]  # sentences of which each picture has a true one: nouns, styles, ...


def new_lesson(
    composer: Composer, tokenizer: Tokenizer, first: int, device: torch.device
) -> Lesson:
    """The batch of the compositions from `first` on, and what is asked about them."""
    rng = np.random.default_rng((2, first))
    compositions = [composer.compose(first + place) for place in range(BATCH_SIZE)]
    choices = _choices(composer, compositions, rng)
    short = [query for group in choices for query in group]
    told = compositions[:_PICTURES_TOLD]
    long = [
        *(partial_query(composition, rng) for composition in told),
        *(altered_query(c, composer.nouns, composer.styles, rng) for c in told),
        *map(caption_query, told),
    ]
    truths = truth_matrix(short + long, compositions)
    for place in range(len(told)):  # the last columns: a caption is true of its own picture
        truths[place, place - len(told)] = TRUE
    ends = np.cumsum([0, *map(len, choices)]).tolist()
    pixels = to_tensor(np.stack([composition.pixels for composition in compositions]), device)
    return Lesson(
        augmented(pixels, rng),
        tuple(
            tokenized(tokenizer, [query.sentence for query in queries]).to(device)
            for queries in (short, long)
        ),
        torch.from_numpy(truths).float().to(device),
        tuple(slice(start, end) for start, end in itertools.pairwise(ends)),
    )


def _choices(
    composer: Composer, compositions: list[Composition], rng: np.random.Generator
) -> list[list[Query]]:
    """Nouns, styles and backgrounds, in words at random: those of the pictures, and others."""
    shown = {item.noun for composition in compositions for item in composition.shown}
    others = [noun for noun in composer.nouns if noun not in shown]
    asked = rng.permutation(others)[: max(0, _NOUNS_ASKED - len(shown))].tolist()
    groups = [
        [noun_query(noun) for noun in (*sorted(shown), *asked)],
        [style_query(style) for style in composer.styles],
        [background_query(name) for name in BACKGROUNDS],
    ]
    return [[rephrased(query, rng) for query in group] for group in groups]


def tokenized(tokenizer: Tokenizer, sentences: Sequence[str]) -> Tokens:
    """Token ids and mask, padded to the longest sentence."""
    encodings = tokenizer.encode_batch(list(sentences))
    return Tokens(
        torch.tensor([encoding.ids for encoding in encodings]),
        torch.tensor([encoding.attention_mask for encoding in encodings]),
    )


def new_tokenizer(composer: Composer) -> Tokenizer:
    """Byte-level BPE learned from sentences; any text has tokens."""
    rng = np.random.default_rng(3)
    compositions = [composer.compose(index) for index in range(_CORPUS_COMPOSITIONS)]
    corpus = [composition.caption for composition in compositions]
    corpus += [partial_query(composition, rng).sentence for composition in compositions]
    corpus += [noun_query(noun).sentence for noun in composer.nouns] * 10
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=[_PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(_PAD), pad_token=_PAD)
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def augmented(
    pixels: Float[Tensor, "images 3 height width"], rng: np.random.Generator
) -> Float[Tensor, "images 3 height width"]:
    """Pictures as a diffusion model would draw them: moved a little, soft, noisy, off in shade.

    Half of them lose detail, by a blur or by reducing and enlarging.
    """
    count, side = len(pixels), pixels.shape[-1]
    pixels = _moved(pixels, rng)
    parts = list(pixels.split(count // 8))
    for place in (0, 1):
        parts[place] = _blurred(parts[place], rng.uniform(0.3, 1.2))
    for place in (2, 3):
        smaller = int(rng.integers(side * 3 // 8, side))
        reduced = F.interpolate(parts[place], size=smaller, mode="area")
        parts[place] = F.interpolate(reduced, size=side, mode="bilinear", align_corners=False)
    soft = torch.cat(parts)
    gain = torch.from_numpy(rng.uniform(0.88, 1.08, (count, 1, 1, 1))).to(soft)
    offset = torch.from_numpy(rng.normal(0, 0.04, (count, 3, 1, 1))).to(soft)
    deviation = torch.from_numpy(rng.uniform(0, 0.08, (count, 1, 1, 1))).to(soft)
    noisy = gain * soft + offset + deviation * torch.randn_like(soft)
    return noisy.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def _moved(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture a little larger or smaller, and shifted by up to two pixels."""
    count, side = len(pixels), pixels.shape[-1]
    scale = rng.uniform(0.92, 1.06, count)
    shift = rng.uniform(-4 / side, 4 / side, (count, 2))
    affine = np.zeros((count, 2, 3), dtype=np.float32)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = shift
    grid = F.affine_grid(torch.from_numpy(affine).to(pixels), list(pixels.shape), False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of `sigma` pixels."""
    offsets = torch.arange(-4, 5, device=pixels.device)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    weights = weights / weights.sum()
    kernel = torch.outer(weights, weights).expand(3, 1, 9, 9).contiguous()
    return F.conv2d(F.pad(pixels, (4, 4, 4, 4), mode="replicate"), kernel, groups=3)
