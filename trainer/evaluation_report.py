"""The report of an evaluation: everything measured, and all that is needed to measure it again."""

import dataclasses
import json
import types
import typing
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from engine.printing import printable
from trainer.encoders import EncoderDescription
from trainer.evaluation_errors import ReportError
from trainer.evaluation_measures import MEASURES
from trainer.evaluation_prompts import Prompt
from trainer.scores import Spread
from trainer.tradeoff import TradeOffPoint, pareto_front

SCHEMA = "oneword-evaluation/1"
_MOST_BYTES = 64 << 20

Role = Literal[
    "concept",
    "training images",  # against each other: the upper bound of likeness
    "class word",  # prompt only: the class word in place of the learned word
    "word left out",  # prompt only: nothing in its place
    "random images",  # what the model draws for an empty prompt
]
REFERENCES: tuple[Role, ...] = ("training images", "class word", "word left out", "random images")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How pictures were drawn. Picture i of prompt j with seed s has the noise of
    `trainer.evaluation_drawing.noise_seed(s, j) + i`, whatever is judged."""

    model_name: str
    bundle: str
    embedding_fingerprint: str
    width: int  # pixels
    height: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    num_samples: int  # pictures a prompt, for each seed
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A concept, or a reference for it, as every encoder sees it."""

    label: str  # of the concept, also in its references
    role: Role
    measures: dict[str, dict[str, Spread]]  # encoder name -> measure -> over the seeds
    source: str = ""  # the concept file
    placeholder_token: str = ""
    concept_id: str = ""
    class_word: str = ""
    training_images: tuple[str, ...] = ()
    masked_images: int = 0
    learned_with: dict[str, str] = dataclasses.field(default_factory=dict)  # the file's metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """One run of `oneword evaluate`."""

    schema: str = SCHEMA
    version: str
    date: str
    seconds: float
    benchmark: str
    caveats: tuple[str, ...]
    figure_encoder: str  # whose numbers are in the figure
    image_measure: str  # the figure's axes, of `MEASURES`
    text_measure: str
    encoders: tuple[EncoderDescription, ...]
    drawing: Drawing
    prompt_source: str
    prompts: tuple[Prompt, ...]
    judged: tuple[Judged, ...]

    def points(self) -> list[TradeOffPoint]:
        """The figure's points: concepts, those of one label averaged."""
        by_label: dict[str, list[TradeOffPoint]] = defaultdict(list)
        for point in self._positions("concept"):
            by_label[point.label].append(point)
        return [_centre(label, points) for label, points in by_label.items()]

    def references(self) -> list[TradeOffPoint]:
        """The figure's lines: each reference, averaged over all concepts."""
        by_role = {role: self._positions(role) for role in REFERENCES}
        return [_centre(role, points) for role, points in by_role.items() if points]

    def _positions(self, role: Role) -> list[TradeOffPoint]:
        found: list[TradeOffPoint] = []
        for judged in self.judged:
            measures = judged.measures.get(self.figure_encoder, {})
            image, text = measures.get(self.image_measure), measures.get(self.text_measure)
            if judged.role == role and image and text:
                found.append(
                    TradeOffPoint(
                        label=judged.label, image_similarity=image.mean, text_similarity=text.mean
                    )
                )
        return found


def _centre(label: str, points: Sequence[TradeOffPoint]) -> TradeOffPoint:
    return TradeOffPoint(
        label=label,
        image_similarity=fmean(point.image_similarity for point in points),
        text_similarity=fmean(point.text_similarity for point in points),
    )


def report_to_json(report: EvaluationReport) -> bytes:
    """The report as a JSON file, with the meaning of each measure beside it."""
    stored = {
        **dataclasses.asdict(report),
        "measures": MEASURES,
        "pareto_front": [point.label for point in pareto_front(report.points())],
    }
    return (json.dumps(stored, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def report_from_json(content: bytes, *, source: str = "the report") -> EvaluationReport:
    """The report of a file; raises `ReportError` for one that is broken or of another version."""
    if len(content) > _MOST_BYTES:
        raise ReportError(f"{source} has {len(content)} bytes, at most {_MOST_BYTES} are read")
    try:
        stored = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{source} is not JSON ({error}); make it anew") from error
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        found = stored.get("schema") if isinstance(stored, dict) else type(stored).__name__
        raise ReportError(
            f"{source} is of schema {str(found)[:40]!r}, this version reads {SCHEMA!r}; make it "
            "anew with `oneword evaluate`"
        )
    try:
        return _built(EvaluationReport, stored)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{source} is not a whole report: {error}; make it anew") from error


def read_report(path: Path) -> EvaluationReport:
    """The report of a path; raises `ReportError`."""
    try:
        return report_from_json(path.read_bytes(), source=str(path))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error


def _built(kind: Any, value: Any) -> Any:
    """JSON as the value of an annotation: dataclasses, tuples, dicts, unions with None, scalars."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [field.name for field in dataclasses.fields(kind)]
        return typing.cast(Any, kind)(**{name: _built(hints[name], value[name]) for name in fields})
    if origin is tuple:
        return tuple(_built(inner[0], item) for item in _of_type(value, list))
    if origin is dict:
        return {str(k): _built(inner[1], item) for k, item in _of_type(value, dict).items()}
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _built(inner[0], value)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{value!r} is none of {', '.join(map(str, inner))}")
        return value
    return float(_of_type(value, int | float)) if kind is float else _of_type(value, kind)


def _of_type(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{str(value)[:40]!r} is not of type {getattr(kind, '__name__', kind)}")
    return value


_COLUMNS = (
    ("image", "image_similarity"),
    ("of means", "image_similarity_of_means"),
    ("masked", "image_similarity_masked"),
    ("text", "text_similarity"),
    ("of means", "text_similarity_of_means"),
    ("class text", "text_similarity_class_word"),
    ("diversity", "diversity"),
)
_ALSO = {
    "image_similarity_all_prompts": "image, all",
    "text_similarity_class_word": "class text",
    "clip_score_class_word": "CLIP-T x2.5",
}


def text_table(report: EvaluationReport) -> str:
    """The report for people: one table for each encoder, and what to know before believing it."""
    lines = [f"{report.drawing.model_name}, benchmark {report.benchmark}, {report.prompt_source}"]
    lines.append(_drawn_with(report))
    for encoder in report.encoders:
        lines += ["", f"{encoder.name} ({encoder.kind}, {encoder.image_size} pixels)"]
        lines += [f"judges {encoder.judges}", *_rows(report, encoder.name)]
    front = ", ".join(point.label for point in pareto_front(report.points()))
    lines += ["", f"not beaten in both measures of the figure: {front or 'none'}"]
    lines += [f"note: {caveat}" for caveat in report.caveats]
    return "\n".join(map(printable, lines)) + "\n"


def _drawn_with(report: EvaluationReport) -> str:
    drawing = report.drawing
    seeds = ", ".join(map(str, drawing.seeds))
    return (
        f"{len(report.prompts)} prompts, {drawing.num_samples} pictures each for seed {seeds}; "
        f"{drawing.sampler}, {drawing.num_inference_steps} steps, guidance "
        f"{drawing.guidance_scale:g}, {drawing.width} x {drawing.height}"
    )


def _rows(report: EvaluationReport, encoder: str) -> list[str]:
    columns = list(_COLUMNS)
    for measure in (report.image_measure, report.text_measure):
        if measure not in [name for _, name in columns]:
            columns.append((_ALSO[measure], measure))
    cells = [["", "", *(title for title, _ in columns)]]
    for judged in report.judged:
        measures = judged.measures.get(encoder, {})
        values = [_cell(measures.get(name)) for _, name in columns]
        cells.append([judged.label, judged.role, *values])
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cell(value: Spread | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.3f}" + ("" if value.std is None else f" +-{value.std:.3f}")
