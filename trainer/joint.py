"""Several words in one run, with images that show all of them at once.

Learned apart, two words often fail side by side: no image of either had another subject (Gal et al.
2022, section 4.4, which supposes that scenes of several objects would help). Here each word has
images of its own, as ever, and further images come with sentences that name all words.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Self

import torch
from jaxtyping import Int64
from torch import Tensor

from engine.concepts import Concept, check_placeholder_token
from trainer.checkpoints import RunIdentity
from trainer.errors import LearningError
from trainer.fingerprint import model_fingerprint
from trainer.images import TrainingImages
from trainer.latents import LatentDistribution
from trainer.learning import MAX_ROWS, follow
from trainer.material import EVALUATION_BATCH_SIZE, Part, objective_of
from trainer.model import DiffusionModel
from trainer.objective import Batch, Objective
from trainer.options import AUTO, LearnOptions
from trainer.provenance import concept_metadata
from trainer.run import LearnState, Run
from trainer.splicing import TemplatePrompts, as_concept
from trainer.starts import Start
from trainer.templates import LearnableProperty

_BEGINNINGS = ("a photo of", "a picture of", "a good photo of", "an image of", "a rendering of")
# What belongs to each word, and has no meaning for all of them.
_OF_WORDS = ("num_vectors", "initializer_token", "initializer_candidates", "learnable_property")
_ALONE = ("progressive", "per_image_tokens", "warm_start")


@dataclass(frozen=True, slots=True, kw_only=True)
class JointWord:
    """One of the words: its name, its own images, and what `LearnOptions` would say of it alone."""

    placeholder_token: str
    images: TrainingImages
    num_vectors: int = 1
    initializer_token: str | None = None  # a word or phrase; None: the mean of the vocabulary
    learnable_property: LearnableProperty = "object"


def learn_jointly(
    model: DiffusionModel,
    words: Sequence[JointWord],
    together: TrainingImages,
    options: LearnOptions,
    *,
    sentences: Sequence[str] = (),
    resume_from: LearnState | None = None,
    max_rows: int = MAX_ROWS,
) -> Iterator[LearnState]:
    """Learn several words in one run; yields its states as `learn` does.

    `together` are images that show all words. Their `sentences` name each word once, by its place,
    as in "a photo of {0} beside {1}", and are read as prompts are; without any the words are
    joined by "and". Captions of these images are not used. A step has `batch_size` samples of each
    word's own images and as many of `together`; the loss and the choice of the best vectors are
    means over all. The rows of a state's vectors are those of the words in turn;
    `joint_concepts` takes them apart.

    Raises `LearningError` for options that are a word's own or do not go together with this, for
    sentences that do not name each word once, and for fewer than two words; errors are otherwise
    those of `learn`.
    """
    _check_words(words)
    _check_sizes([*(word.images for word in words), together])
    _check_options(options)
    run = Run.of(
        model,
        JointImages.of(model, words, together, options, sentences or sentences_for(len(words))),
        options,
        starts=tuple(
            Start(initializer_token=word.initializer_token, num_vectors=word.num_vectors)
            for word in words
        ),
        num_word_vectors=sum(word.num_vectors for word in words),
        label="",
    )
    for (state,) in follow(model, [run], [resume_from], max_rows=max_rows):
        yield state


def joint_concepts(
    model: DiffusionModel,
    words: Sequence[JointWord],
    options: LearnOptions,
    state: LearnState,
    *,
    latest: bool = False,
) -> list[Concept]:
    """The vectors of a joint run as a concept for each word, which says how it came to be.

    The best ones, or with `latest` those of the last step.
    """
    chosen = state.vectors if latest else state.best_vectors
    vectors = chosen.split([word.num_vectors for word in words])
    names = [word.placeholder_token for word in words]
    return [
        as_concept(
            model,
            own,
            placeholder_token=word.placeholder_token,
            metadata={
                **concept_metadata(state, _own_options(word, options), word.images, model),
                "learned_with": ", ".join(name for name in names if name != word.placeholder_token),
            },
        )
        for word, own in zip(words, vectors, strict=True)
    ]


def joint_identity(
    model: DiffusionModel,
    words: Sequence[JointWord],
    together: TrainingImages,
    options: LearnOptions,
    sentences: Sequence[str],
) -> RunIdentity:
    """What must be the same for a joint run to go on: that of each word, and the sentences."""
    fingerprint = model_fingerprint(model)
    parts = [
        RunIdentity.of(
            model,
            images,
            options,
            placeholder_token=name,
            fingerprint=fingerprint,
        )
        for name, images in (
            *((word.placeholder_token, word.images) for word in words),
            ("", together),
        )
    ]
    told = {
        f"word {place}": [word.placeholder_token, word.num_vectors, word.initializer_token,
                          word.learnable_property]
        for place, word in enumerate(words)
    }  # fmt: skip
    return RunIdentity(
        options={**parts[0].options, **told, "sentences": list(sentences)},
        placeholder_token=", ".join(word.placeholder_token for word in words),
        # An image that has moved from one word to another is noticed, too.
        images=tuple(f"{place} {one}" for place, part in enumerate(parts) for one in part.images),
        masks=" ".join(part.masks for part in parts),
        captions=" ".join(part.captions for part in parts),
        model=fingerprint,
        towers=(),
    )


def sentences_for(count: int) -> tuple[str, ...]:
    """Sentences that name `count` words, in both orders so that none is always the first."""
    places = [f"{{{place}}}" for place in range(count)]
    return tuple(
        f"{beginning} {article}{f' and {article}'.join(order)}"
        for beginning in _BEGINNINGS
        for article in ("", "a ")
        for order in (places, places[::-1])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JointImages:
    """Each word's own images with its vectors, and those of all words with all vectors."""

    sources: tuple[Objective, ...]
    rows: tuple[Int64[Tensor, " slots"], ...]  # of the vectors, for each source
    fixed: tuple[Batch, ...]

    @classmethod
    def of(
        cls,
        model: DiffusionModel,
        words: Sequence[JointWord],
        together: TrainingImages,
        options: LearnOptions,
        sentences: Sequence[str],
    ) -> Self:
        _check_sentences(sentences, len(words))
        counts = [word.num_vectors for word in words]
        own = [
            objective_of(
                model, word.images, _own_options(word, options), num_vectors=word.num_vectors
            )
            for word in words
        ]
        of_all = Objective.of(
            model,
            LatentDistribution.encode(model, together.pixels),
            TemplatePrompts.lay_out(model, sentences, *counts),
            masks=together.masks,
        )
        every = torch.arange(sum(counts))
        sources = (*own, of_all)
        return cls(
            sources=sources,
            rows=(*every.split(counts), every),
            fixed=tuple(source.draw_evaluation(EVALUATION_BATCH_SIZE) for source in sources),
        )

    def draw(
        self, batch_size: int, generator: torch.Generator, *, num_vectors: int
    ) -> tuple[Part, ...]:
        return tuple(
            Part(objective=source, batch=source.draw(batch_size, generator), rows=rows)
            for source, rows in zip(self.sources, self.rows, strict=True)
        )

    def evaluation(self, *, num_vectors: int) -> tuple[Part, ...]:
        return tuple(
            Part(objective=source, batch=batch, rows=rows)
            for source, batch, rows in zip(self.sources, self.fixed, self.rows, strict=True)
        )


def _own_options(word: JointWord, options: LearnOptions) -> LearnOptions:
    return dataclasses.replace(
        options,
        num_vectors=word.num_vectors,
        initializer_token=word.initializer_token,
        learnable_property=word.learnable_property,
    )


def _check_words(words: Sequence[JointWord]) -> None:
    if len(words) < 2:
        raise LearningError(f"a joint run needs at least 2 words, got {len(words)}; use learn()")
    names = [word.placeholder_token for word in words]
    for name in names:
        check_placeholder_token(name)
        if names.count(name) > 1:
            raise LearningError(f"two words of a joint run are called {name!r}; rename one of them")
    for word in words:
        if word.num_vectors < 1:
            raise LearningError(
                f"{word.placeholder_token}: num_vectors must be at least 1, got {word.num_vectors}"
            )
        if word.initializer_token == AUTO:
            raise LearningError(
                f"{word.placeholder_token}: a joint run does not search for an initializer; run "
                f"learn() with initializer_token={AUTO!r} on its images alone, and give the word "
                "that is found"
            )


def _check_sizes(images: Sequence[TrainingImages]) -> None:
    """All samples of a step share one pass."""
    sizes = sorted({f"{one.pixels.shape[-1]} x {one.pixels.shape[-2]}" for one in images})
    if len(sizes) > 1:
        raise LearningError(
            f"the images of a joint run have several sizes ({', '.join(sizes)}); read all of them "
            "with the size of the model"
        )


def _check_options(options: LearnOptions) -> None:
    plain = LearnOptions()
    for name in _OF_WORDS:
        if getattr(options, name) != getattr(plain, name):
            raise LearningError(
                f"{name}={getattr(options, name)!r} belongs to a word; give it with each JointWord"
            )
    check_for_all(options)


def check_for_all(options: LearnOptions) -> None:
    """Raise `LearningError` for options that have no meaning for several words at once."""
    for name in _ALONE:
        if getattr(options, name):
            raise LearningError(f"{name} is for one word alone; leave it out of a joint run")


def _check_sentences(sentences: Sequence[str], count: int) -> None:
    wanted = [str(place) for place in range(count)]
    for sentence in sentences:
        try:
            named = sorted(
                name for _, name, _, _ in Formatter().parse(sentence) if name is not None
            )
        except ValueError as error:
            raise LearningError(f"the sentence {sentence!r} cannot be read: {error}") from error
        if named != sorted(wanted):
            raise LearningError(
                f"the sentence {sentence!r} must name each word once, by its place: "
                f"{', '.join(f'{{{place}}}' for place in wanted)}; as in "
                f"{sentences_for(count)[0]!r}"
            )
