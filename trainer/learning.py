"""Learning new words: Textual Inversion (Gal et al. 2022, arXiv 2208.01618).

Only the new vectors are learned; vocabulary, text encoder, denoiser and autoencoder stay as they
are. `learn` is a generator of states: progress, previews and checkpoints happen to it from outside,
and a run that goes on from any of its states repeats the rest bit for bit (on the CPU).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from trainer.image_tower import ImageTower
from trainer.images import TrainingImages
from trainer.material import losses_and_gradients
from trainer.model import DiffusionModel
from trainer.options import LearnOptions
from trainer.run import LearnState, Run

MAX_ROWS = 64  # samples with a gradient in one pass of the denoiser


def learn(
    model: DiffusionModel,
    images: TrainingImages,
    options: LearnOptions,
    *,
    towers: Sequence[ImageTower] = (),
    resume_from: LearnState | None = None,
    max_rows: int = MAX_ROWS,
) -> Iterator[LearnState]:
    """Yield the state before the first step (unless resumed), then after each step.

    A step of more than `max_rows` samples takes several passes of the denoiser. The result is
    `best_vectors` of the last state. A step whose loss, gradient or evaluation is NaN or infinite
    yields the last evaluated state again, to go on from with half the learning rate.
    Raises `Diverged` when that has not helped `MAX_ROLLBACKS` times, or `NoGradient`; the state
    yielded before is then the last good one.

    Image `towers` of the model's text encoders have a say in where learning starts; a run that is
    resumed has no use for them.
    """
    for (state,) in learn_together(
        model, [images], [options], towers=towers, resume_from=[resume_from], max_rows=max_rows
    ):
        yield state


def learn_together(
    model: DiffusionModel,
    images: Sequence[TrainingImages],
    options: Sequence[LearnOptions],
    *,
    towers: Sequence[ImageTower] = (),
    resume_from: Sequence[LearnState | None] | None = None,
    max_rows: int = MAX_ROWS,
) -> Iterator[tuple[LearnState, ...]]:
    """Learn several concepts of one model at once; yields the states of all, in their order.

    Each concept has its own images, options, draws, evaluation and end, and becomes what it would
    become alone, to the rounding of sums. A pass of the denoiser holds at most `max_rows` samples:
    of as many unfinished concepts as fit, or a part of one's. One that is finished keeps its last
    state. Errors are those of `learn`, and name the concept.
    """
    count = len(images)
    given = resume_from or [None] * count
    runs = [
        Run.prepare(
            model,
            own,
            told,
            towers=() if state else towers,
            label=f"concept {place} of {count}: " if count > 1 else "",
        )
        for place, (own, told, state) in enumerate(
            zip(images, options, given, strict=True), start=1
        )
    ]
    yield from follow(model, runs, given, max_rows=max_rows)


def follow(
    model: DiffusionModel,
    runs: Sequence[Run],
    given: Sequence[LearnState | None],
    *,
    max_rows: int = MAX_ROWS,
) -> Iterator[tuple[LearnState, ...]]:
    """The states of all runs from the given ones, or their first ones, to their ends."""
    states = [state or run.first_state(model) for run, state in zip(runs, given, strict=True)]
    if any(state is None for state in given):
        yield tuple(states)
    while unfinished := [at for at, run in enumerate(runs) if not run.ends_at(states[at])]:
        for group in _grouped(unfinished, [run.options.batch_size for run in runs], max_rows):
            advanced = _advance(
                [runs[place] for place in group], [states[place] for place in group], max_rows
            )
            for place, state in zip(group, advanced, strict=True):
                states[place] = state
        yield tuple(states)


def _grouped(places: Sequence[int], rows: Sequence[int], max_rows: int) -> list[list[int]]:
    """The places in runs of at most `max_rows` rows together; one that has more is alone."""
    groups: list[list[int]] = []
    for place in places:
        if groups and sum(rows[other] for other in groups[-1]) + rows[place] <= max_rows:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _advance(
    runs: Sequence["Run"], states: Sequence[LearnState], max_rows: int
) -> list[LearnState]:
    """One step of each run in one pass: a pure function of their states."""
    drawn = [run.draw(state) for run, state in zip(runs, states, strict=True)]
    results = losses_and_gradients(
        [(state.vectors, parts) for state, (parts, _) in zip(states, drawn, strict=True)],
        max_rows=max_rows,
    )
    return [
        run.after(replace(state, rng_state=rng_state), loss, gradient)
        for run, state, (_, rng_state), (loss, gradient) in zip(
            runs, states, drawn, results, strict=True
        )
    ]
