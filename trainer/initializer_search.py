"""The search for a word to start from: the one that already lowers the loss on the images most."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32
from tokenizers import Tokenizer
from torch import Tensor

from trainer.errors import LearningError
from trainer.initializer import phrase_vectors
from trainer.model import DiffusionModel
from trainer.objective import Batch, Objective, Vectors
from trainer.options import MAX_CANDIDATES
from trainer.splicing import plain_tokenizer

FINALISTS = 8  # are compared on the whole evaluation batch
BY_SIMILARITY = 32  # are left of all candidates where an image tower compares them first
_KEPT = 4  # of so many candidates one stays for the next round
_STRIDES = (8, 4, 2)  # a round takes every so-manieth sample of the evaluation batch
_FEWEST_LETTERS = 2

# Of phrases with the images, in their order; higher is closer.
Similarities = Callable[[Sequence[str]], Float32[Tensor, " words"]]
Words = Float32[Tensor, "words num_vectors all_dims"]


class RankedWord(NamedTuple):
    """A word, and the loss on the whole evaluation batch with its own embedding as the new word."""

    word: str
    loss: float


def search(
    model: DiffusionModel,
    objective: Objective,
    evaluation: Batch,
    *,
    num_vectors: int,
    start: Callable[[Vectors], Vectors],
    candidates: Sequence[str] = (),
    similarities: Similarities | None = None,
    batch_size: int,
) -> tuple[RankedWord, ...]:
    """The best initializers, at most `FINALISTS`, best first.

    Candidates are the phrases that are given, or else `vocabulary_words`. Of those the loss decides
    between the `BY_SIMILARITY` most like the images, where `similarities` can tell; otherwise
    between all, where they are more than `MAX_CANDIDATES` the `most_promising`. `start` is applied
    to a phrase's vectors as it will be when learning starts from it. Raises `LearningError` if
    there is no candidate.
    """
    words = list(candidates) or vocabulary_words(model)
    if not words:
        raise LearningError(
            "no token of this model's vocabulary is a word of two letters or more; give "
            "--initializer-candidates, or an --initializer-token"
        )
    if similarities is not None:
        order: list[int] = similarities(words).argsort(descending=True, stable=True).tolist()
        words = [words[place] for place in order[:BY_SIMILARITY]]
    elif len(words) > MAX_CANDIDATES:
        words = most_promising(
            model, objective, evaluation, words, start=start, batch_size=batch_size
        )
    vectors = torch.stack([start(phrase_vectors(model, word, num_vectors)) for word in words])
    return ranked(objective, evaluation, words, vectors, at_once=4 * batch_size)


def vocabulary_words(model: DiffusionModel) -> list[str]:
    """The words that are one token for each text encoder, a to z only, by the first one's ids."""
    first, *others = (_single_tokens(plain_tokenizer(encoder)) for encoder in model.encoders)
    return [word for word in first if all(word in other for other in others)]


def _single_tokens(tokenizer: Tokenizer) -> dict[str, None]:
    """Words that a tokenizer keeps whole, in the order of their ids."""
    bpe: Any = tokenizer.model
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda token: token[1])
    texts = [token.removesuffix(bpe.end_of_word_suffix or "") for token, _ in tokens]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    # A piece of a word has only letters as well, but alone it is another token.
    return {
        text: None
        for text, (_, token_id), encoding in zip(texts, tokens, encoded, strict=True)
        if text.isascii()
        and text.isalpha()
        and len(text) >= _FEWEST_LETTERS
        and encoding.ids == [token_id]
    }


def most_promising(
    model: DiffusionModel,
    objective: Objective,
    evaluation: Batch,
    words: Sequence[str],
    *,
    start: Callable[[Vectors], Vectors],
    batch_size: int,
) -> list[str]:
    """The `MAX_CANDIDATES` words that the loss falls most towards, to first order.

    Of the loss linearized at the mean of the vocabulary, as AutoPrompt chooses its candidates
    (Shin et al. 2020, arXiv 2010.15980, section 2.2): one gradient ranks the whole vocabulary.
    """
    num_vectors = objective.prompts.slots.shape[1]
    middle = start(phrase_vectors(model, None, num_vectors))
    gradient = torch.zeros_like(middle)
    for part in evaluation.split(batch_size):
        gradient += objective.loss_and_gradient(middle, part)[1] * (len(part) / len(evaluation))
    # A word takes all places of the new one; what does not depend on the word is left out.
    slopes = start(_rows(model, words)) @ gradient.sum(dim=0)
    best: list[int] = slopes.argsort(stable=True)[:MAX_CANDIDATES].tolist()
    return [words[place] for place in best]


def _rows(model: DiffusionModel, words: Sequence[str]) -> Float32[Tensor, "words all_dims"]:
    """The embeddings of words that are one token each."""
    parts: list[Tensor] = []
    for encoder in model.encoders:
        encoded = plain_tokenizer(encoder).encode_batch(list(words), add_special_tokens=False)
        parts.append(encoder.token_embedding.cpu()[[encoding.ids[0] for encoding in encoded]])
    return torch.cat(parts, dim=1)


def ranked(
    objective: Objective,
    evaluation: Batch,
    words: Sequence[str],
    vectors: Words,
    *,
    at_once: int,
) -> tuple[RankedWord, ...]:
    """The words with the lowest loss, at most `FINALISTS`, by successive halving.

    All are tried on every eighth sample by timestep, the best quarter on every fourth, and so on
    (Jamieson and Talwalkar 2016, arXiv 1502.07943, with quarters for halves); each round has the
    same samples and noise for all. The finalists see the whole batch.
    """
    by_timestep = evaluation.timesteps.argsort(stable=True)
    left = torch.arange(len(words))
    for stride in _STRIDES:
        if len(left) <= FINALISTS:
            break
        samples = evaluation.take(by_timestep[stride // 2 :: stride])
        losses = mean_losses(objective, samples, vectors[left], at_once=at_once)
        left = left[losses.argsort(stable=True)[: max(FINALISTS, len(left) // _KEPT)]]
    losses = mean_losses(objective, evaluation, vectors[left], at_once=at_once)
    best = losses.argsort(stable=True)[:FINALISTS]
    places: list[int] = left[best].tolist()
    found = zip(places, losses[best].tolist(), strict=True)
    return tuple(RankedWord(words[place], loss) for place, loss in found)


@torch.no_grad()
def mean_losses(
    objective: Objective, batch: Batch, vectors: Words, *, at_once: int
) -> Float32[Tensor, " words"]:
    """The mean loss of one batch with each word's vectors, `at_once` samples at a time."""
    losses = [
        objective.losses(vectors[rows // len(batch)], batch.take(rows % len(batch)))
        for rows in torch.arange(len(vectors) * len(batch)).split(at_once)
    ]
    return torch.cat(losses).cpu().view(len(vectors), len(batch)).mean(dim=1)
