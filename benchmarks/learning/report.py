"""The results of the benchmark: kept as JSON, shown as a page."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.learning.measure import Measured, as_json, from_json
from benchmarks.learning.settings import PEER, REMOVED, SETTINGS
from benchmarks.peers import ROOT
from benchmarks.run import machine
from engine.files import write_atomically

REPORT = ROOT / "docs" / "benchmarks" / "learning.json"

_COLUMNS: dict[str, Callable[[Measured], float]] = {
    "loss": lambda one: one.judgement.loss,
    "similarity": lambda one: one.judgement.similarity,
    "edited": lambda one: one.judgement.edited_similarity,
    "colours": lambda one: one.judgement.colours,
    "companions": lambda one: one.judgement.companions,
    "norm": lambda one: one.judgement.norm,
}
_COMPARED = ("loss", "similarity", "edited", "companions")


def read_results(report: Path) -> list[Measured]:
    if not report.is_file():
        return []
    return [from_json(one) for one in json.loads(report.read_text())["results"]]


def write_results(report: Path, results: Sequence[Measured]) -> None:
    """JSON, and beside it the page."""
    ordered = sorted(results, key=lambda one: one.key)
    content = {"machine": machine(), "results": [as_json(one) for one in ordered]}
    write_atomically(report, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(report.with_suffix(".md"), page(ordered).encode())


def page(results: Sequence[Measured]) -> str:
    """Two tables: beside the script, and each setting beside the first."""
    info = machine()
    return "\n".join(
        [
            "# Ways of learning a word, compared",
            "",
            f"`python -m benchmarks.learning`, {info['date']}, {info['processor']}, "
            f"{info['cores']} cores, one thread a run; torch {info['versions']['torch']}, "
            f"diffusers {info['versions']['diffusers']}. The embedded model; words for objects "
            "that it has never seen. All but those without a word or with a searched one start "
            "from the coarse word that the script is given, and take 150 steps of 8 samples where "
            "nothing else is said; the denoiser learns in bfloat16 (the script's in float32). The "
            "script has the settings of its README; `adamw` is the paper's optimizer and rate. A "
            "run counts where the one that it is compared with is there, too.",
            "",
            "Loss: the denoising loss on 256 samples that no run has seen. Similarity: the mean "
            "cosine (of the evaluator) of eight neutral pictures to the training images; edited: "
            "of pictures on sixteen coloured backgrounds. Colours: share of these backgrounds that "
            "are there; companions: share of twelve second objects (\"<word> and a cat\") that are "
            "among the two first that the evaluator names. In brackets the standard deviation over "
            "seeds, averaged over words. Against: what it has more than the one that it is "
            "compared with, on the same words and seeds, with the standard error over words; "
            "twice that is a difference.",
            "",
            "## Beside diffusers' script",
            "",
            *_table(results, [PEER, *SETTINGS, *REMOVED], beside=PEER),
            "",
            "## Ablation",
            "",
            *_table(results, [*SETTINGS, *REMOVED], beside=next(iter(SETTINGS))),
            "",
        ]
    )  # fmt: skip


def _table(results: Sequence[Measured], names: Sequence[str], *, beside: str) -> list[str]:
    """Each setting beside another one, on the words and seeds that both have learned."""
    lines = [
        f"| setting | runs | rows | {' | '.join(_COLUMNS)} | "
        f"{' | '.join(f'{title}, against' for title in _COMPARED)} |",
        "|---" * (3 + len(_COLUMNS) + len(_COMPARED)) + "|",
    ]
    for name in names:
        mine = {one.key[1:]: one for one in results if one.setting == name}
        other = {one.key[1:]: one for one in results if one.setting == beside}
        if shared := sorted(mine.keys() & other.keys()):
            lines.append(_row(name, [mine[k] for k in shared], [other[k] for k in shared]))
    return lines


def _row(name: str, mine: Sequence[Measured], other: Sequence[Measured]) -> str:
    words = {one.concept for one in mine}
    cells = [
        f"{statistics.fmean(map(column, mine)):.4f}{_spread(mine, column)}"
        if title in ("loss", "similarity")
        else f"{statistics.fmean(map(column, mine)):.3f}"
        for title, column in _COLUMNS.items()
    ]
    pairs = list(zip(mine, other, strict=True))
    against = [_difference(pairs, _COLUMNS[title]) for title in _COMPARED]
    rows = statistics.fmean(one.rows for one in mine)
    return (
        f"| {name} | {len(mine)} runs, {len(words)} words | {rows:.0f} | {' | '.join(cells)} | "
        f"{' | '.join(against)} |"
    )


def _difference(
    pairs: Sequence[tuple[Measured, Measured]], column: Callable[[Measured], float]
) -> str:
    """The mean over words of what one has more than the other, and its standard error."""
    by_word: dict[str, list[float]] = {}
    for one, other in pairs:
        by_word.setdefault(one.concept, []).append(column(one) - column(other))
    means = [statistics.fmean(values) for values in by_word.values()]
    if not any(means):
        return ""  # beside itself
    error = f" ± {statistics.stdev(means) / len(means) ** 0.5:.4f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):+.4f}{error}"


def _spread(results: Sequence[Measured], column: Callable[[Measured], float]) -> str:
    by_word: dict[str, list[float]] = {}
    for one in results:
        by_word.setdefault(one.concept, []).append(column(one))
    spreads = [statistics.stdev(values) for values in by_word.values() if len(values) > 1]
    return f" ({statistics.fmean(spreads):.4f})" if spreads else ""
