"""`oneword evaluate`: concepts in; a report, a table and the paper's figure out."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from engine.files import write_atomically
from engine.pipeline import Pipeline
from engine.printing import printable
from engine.requests import Limits
from trainer.benchmark_modes import MODES, BenchmarkMode, prompts_of_mode
from trainer.encoders import DEFAULT_ENCODER, Encoder, default_encoder, open_encoder
from trainer.evaluation import DrawingOptions, Evaluation
from trainer.evaluation_drawing import MAX_SAMPLES
from trainer.evaluation_errors import EvaluationError
from trainer.evaluation_prompts import PromptSet
from trainer.evaluation_report import EvaluationReport, Judged, report_to_json, text_table
from trainer.evaluation_subjects import Subject, read_subjects
from trainer.provenance import now, software_version
from trainer.tradeoff_figure import draw_figure, figure_png

REPORT_FILE, TABLE_FILE, FIGURE_FILE = "report.json", "table.txt", "figure.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of drawing have the benchmark's defaults."""
    parser.description = "Measure how faithful and how editable learned words are."
    parser.add_argument(
        "concepts", nargs="+", metavar="CONCEPT", help="FILE, or LABEL=FILE; those of one label "
        "are averaged into one point of the figure"
    )  # fmt: skip
    parser.add_argument("--bundle", type=Path, required=True, help="the model that draws")
    parser.add_argument(
        "--images", type=Path, action="append", required=True, metavar="FOLDER",
        help="training images, masks beside them; once for all concepts, or once for each",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to write to")
    parser.add_argument(
        "--encoder", action="append", metavar="FOLDER_OR_ID",
        help=f"the evaluator, a CLIP or a DINO; repeatable ({DEFAULT_ENCODER})",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="of CLIP and DINO (%(default)s)")
    parser.add_argument(
        "--benchmark", choices=tuple(MODES), default="paper", help="whose conventions (%(default)s)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, {} is the word")
    parser.add_argument(
        "--class-word", action="append", default=[], metavar="WORD",
        help="what it is, such as cat; once or for each (what it was initialized with)",
    )  # fmt: skip
    _add_drawing_options(parser)


def _add_drawing_options(parser: argparse.ArgumentParser) -> None:
    paper = MODES["paper"]
    parser.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help=f"pictures a prompt (paper: {paper.num_samples})",
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=(0,), metavar="N,N", help="repeat with each of these (0)"
    )
    parser.add_argument("--sampler", help=f"(paper: {paper.sampler})")
    parser.add_argument(
        "--num-inference-steps", type=int, metavar="N", help=f"(paper: {paper.num_inference_steps})"
    )
    parser.add_argument(
        "--guidance-scale", type=float, metavar="S", help=f"(paper: {paper.guidance_scale:g})"
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas between them, got {text[:40]!r}"
        ) from error


def run(arguments: argparse.Namespace) -> int:
    """Judge as told, write the three files, print the table. Raises `OneWordError`."""
    started = time.monotonic()
    mode = MODES[arguments.benchmark]
    options = _drawing_options(arguments, mode)
    prompts = prompts_of_mode(mode, arguments.prompts)
    encoders = _open_encoders(arguments.encoder or [default_encoder()], arguments.device)
    pipeline = Pipeline.open(arguments.bundle, limits=Limits(max_images_per_request=MAX_SAMPLES))
    subjects = read_subjects(
        arguments.concepts,
        arguments.images,
        arguments.class_word,
        size=pipeline.bundle.manifest.latents.default_size,
    )
    _say_what_is_missing(subjects, mode)
    _check_output(arguments.output)
    evaluation = Evaluation(pipeline, encoders, prompts, options)
    judged = _judge(evaluation, subjects)
    report = _report(arguments, mode, prompts, encoders, evaluation, judged, started)
    _write(report, arguments.output)
    return 0


def _drawing_options(arguments: argparse.Namespace, mode: BenchmarkMode) -> DrawingOptions:
    def chosen(name: str) -> int | float | str:
        given = getattr(arguments, name)
        return getattr(mode, name) if given is None else given

    return DrawingOptions(
        sampler=str(chosen("sampler")),
        num_inference_steps=int(chosen("num_inference_steps")),
        guidance_scale=float(chosen("guidance_scale")),
        num_samples=int(chosen("num_samples")),
        seeds=arguments.seeds,
    )


def _check_output(output: Path) -> None:
    """Find out now, not after the last picture, that nothing can be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(probe := output / ".probe", b"")
        probe.unlink()
    except OSError as error:
        raise EvaluationError(f"cannot write to --output {output}: {error.strerror}") from error
    if (output / REPORT_FILE).exists():
        print(f"{printable(output / REPORT_FILE)} will be overwritten", file=sys.stderr)


def _open_encoders(names: Sequence[str], device: str) -> list[Encoder]:
    encoders = [open_encoder(name, device=device) for name in dict.fromkeys(names)]
    if not any(encoder.description.reads_text for encoder in encoders):
        raise EvaluationError(
            f"no --encoder reads text ({', '.join(names)}), so there is no text similarity; add a "
            "CLIP, or the embedded model's evaluator"
        )
    return encoders


def _say_what_is_missing(subjects: Sequence[Subject], mode: BenchmarkMode) -> None:
    without = [subject.label for subject in subjects if not subject.class_word]
    if without and "class_word" in mode.text_measure:
        raise EvaluationError(
            f"--benchmark {mode.name} scores text with the class word, and {', '.join(without)} "
            "has none; give --class-word"
        )
    for label in without:
        print(
            f"{printable(label)}: no class word is known, so nothing is measured with it; give "
            "--class-word",
            file=sys.stderr,
        )
    for folder, training in {s.training.folder: s.training for s in subjects}.items():
        print(f"{printable(folder)}: {len(training.names)} training images, "
              f"{len(training.without_background)} with masks")  # fmt: skip
        for skipped in training.skipped:
            print(f"  skipped {printable(skipped)}", file=sys.stderr)


def _judge(evaluation: Evaluation, subjects: Sequence[Subject]) -> list[Judged]:
    evaluation.check(subjects)
    total = evaluation.num_pictures(subjects)
    judged: list[Judged] = []
    with tqdm(total=total, unit="picture", leave=False, disable=not sys.stderr.isatty()) as bar:
        for subject in subjects:
            bar.set_description(printable(subject.label))
            judged += evaluation.judge(subject, bar.update)
    return judged


def _report(
    arguments: argparse.Namespace,
    mode: BenchmarkMode,
    prompts: PromptSet,
    encoders: Sequence[Encoder],
    evaluation: Evaluation,
    judged: Sequence[Judged],
    started: float,
) -> EvaluationReport:
    descriptions = tuple(encoder.description for encoder in encoders)
    return EvaluationReport(
        version=software_version(),
        date=now(),
        seconds=round(time.monotonic() - started, 1),
        benchmark=mode.name,
        caveats=mode.caveats,
        figure_encoder=next(found.name for found in descriptions if found.reads_text),
        image_measure=mode.image_measure,
        text_measure=mode.text_measure,
        encoders=descriptions,
        drawing=evaluation.drawing(str(arguments.bundle)),
        prompt_source=prompts.source,
        prompts=prompts.prompts,
        judged=tuple(judged),
    )


def _write(report: EvaluationReport, output: Path) -> None:
    """The report last: where it is, the others are of the same run."""
    figure = draw_figure(
        report.points(),
        report.references(),
        title=f"{report.drawing.model_name}: {report.benchmark}, {report.figure_encoder}",
        image_label=report.image_measure.replace("_", " "),
        text_label=report.text_measure.replace("_", " "),
    )
    table = text_table(report)
    for name, content in (
        (FIGURE_FILE, figure_png(figure)),
        (TABLE_FILE, table.encode()),
        (REPORT_FILE, report_to_json(report)),
    ):
        write_atomically(output / name, content)
    print(table, end="")
    print(f"wrote {', '.join((REPORT_FILE, TABLE_FILE, FIGURE_FILE))} to {printable(output)}")
