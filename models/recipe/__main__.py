"""python -m models.recipe: makes the embedded model, from emoji to weights."""

import argparse
import sys
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging

from engine.errors import OneWordError
from models.recipe import concepts, icons, rehearsal, sheets, slices
from models.recipe.devices import open_device
from models.recipe.errors import RecipeError
from models.recipe.evaluator_stage import make_evaluator
from models.recipe.figures import PARTS, Figures, chosen_parts
from models.recipe.prompts import SHEET_PROMPTS
from models.recipe.settings import SETTINGS
from models.recipe.stages import HELD_OUT_INDEX, Recipe
from trainer.quiet import quiet_libraries
from trainer.terminal import Terminated, sigterm_raises

_WORK = Path("build/recipe")
_EVALUATOR = Path("models/evaluator")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command of the recipe; returns the exit status."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        with sigterm_raises():
            options.command(options)
    except (RecipeError, OneWordError) as error:
        print(f"models.recipe: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("models.recipe: out of memory; lower the batches of the setting", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.recipe", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    pack = commands.add_parser("icons", help="fetch the icons from npm and pack them")
    pack.set_defaults(command=_icons)

    train = commands.add_parser("train", help="train, or go on where the last run stopped")
    train.add_argument("--minutes", type=float, help="stop after so long; run again to go on")
    train.set_defaults(command=_train)

    sheet = commands.add_parser("sheet", help="draw the sheet of 64 prompts with the model so far")
    sheet.add_argument("--out", type=Path, help="PNG file (default: in the work folder)")
    sheet.set_defaults(command=_sheet)

    pairs = commands.add_parser("pairs", help="unseen pictures beside what the autoencoder decodes")
    pairs.add_argument("--out", type=Path, help="PNG file (default: in the work folder)")
    pairs.set_defaults(command=_pairs)

    export = commands.add_parser("export", help="write the model in the diffusers layout")
    export.add_argument("target", type=Path, help="folder, such as models/emoji")
    export.set_defaults(command=_export)

    away = commands.add_parser("pack-state", help="the training so far, in files under 16 MB")
    away.add_argument("target", type=Path, help="folder for the files")
    away.set_defaults(command=_pack_state)

    back = commands.add_parser("unpack-state", help="go on elsewhere from what pack-state wrote")
    back.add_argument("source", type=Path, help="folder of the files")
    back.set_defaults(command=_unpack_state)

    rehearse = commands.add_parser("rehearse", help="the whole recipe in toy size, as its test")
    rehearse.set_defaults(command=_rehearse)

    examples = commands.add_parser("concepts", help="draw the images that words are taught from")
    examples.add_argument("--out", type=Path, default=Path("out/concepts"), help="folder")
    examples.set_defaults(command=_concepts)

    judge = commands.add_parser("evaluator", help="train and export what judges pictures")
    judge.add_argument("--minutes", type=float, help="stop after so long; run again to go on")
    judge.add_argument("--target", type=Path, default=_EVALUATOR, help="folder (%(default)s)")
    judge.set_defaults(command=_evaluator)

    figures = commands.add_parser("figures", help="measure a model: prints and writes its figures")
    figures.add_argument("--model", type=Path, default=Path("models/emoji"), help="(%(default)s)")
    figures.add_argument("--evaluator", type=Path, default=_EVALUATOR, help="folder (%(default)s)")
    figures.add_argument("--parts", default=",".join(PARTS), help="which (%(default)s)")
    figures.set_defaults(command=_figures)

    for command in (train, sheet, pairs, export, away, back, judge, figures):
        command.add_argument("--setting", choices=sorted(SETTINGS), default="small")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    working = (pack, train, sheet, pairs, export, away, back, rehearse, examples, judge, figures)
    for command in working:
        command.add_argument("--work", type=Path, default=_WORK, help=f"folder (default: {_WORK})")
    return parser


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe(
        setting=SETTINGS[options.setting],
        folder=options.work / options.setting,
        pack=options.work / "icons.zip",
        device=open_device(options.device),
    )


def _icons(options: argparse.Namespace) -> None:
    path = options.work / "icons.zip"
    count = icons.make_pack(path, options.work / "npm")
    print(f"{count} icons in {path}, {path.stat().st_size / 1e6:.1f} MB")


def _train(options: argparse.Namespace) -> None:
    finished = _recipe(options).run(options.minutes)
    print("finished" if finished else "stopped; the same command goes on from here")


def _sheet(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    path = options.out or recipe.folder / "sheet.png"
    pipeline = recipe.pipeline().to(recipe.device)
    sheets.save_sheet(sheets.draw(pipeline, list(SHEET_PROMPTS)), path, columns=8)
    print(path)


def _pairs(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    path = options.out or recipe.folder / "pairs.png"
    sheets.save_pairs(recipe.vae(), recipe.composer(every_object=True), HELD_OUT_INDEX, path)
    print(path)


def _export(options: argparse.Namespace) -> None:
    _recipe(options).export(options.target)
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target}: {size / 1e6:.1f} MB")


def _pack_state(options: argparse.Namespace) -> None:
    files = slices.pack_state(_recipe(options), options.target)
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files in {options.target}, {size / 1e6:.1f} MB")


def _unpack_state(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    slices.unpack_state(recipe, options.source)
    print(f"{recipe.folder}: the same --setting of train goes on from here")


def _rehearse(options: argparse.Namespace) -> None:
    rehearsal.rehearse(options.work)


def _concepts(options: argparse.Namespace) -> None:
    concepts.draw_concepts(options.out, options.work / "npm")
    print(options.out)


def _evaluator(options: argparse.Namespace) -> None:
    shares = make_evaluator(
        SETTINGS[options.setting],
        pack=options.work / "icons.zip",
        folder=options.work / "evaluator" / options.setting,
        target=options.target,
        device=open_device(options.device),
        minutes=options.minutes,
    )
    if shares is None:
        print("stopped; the same command goes on from here")
        return
    for name, share in shares.items():
        print(f"{name}: {share}")


def _figures(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    figures = Figures(
        model=options.model,
        setting=options.setting,
        composer=recipe.composer(),
        every_composer=recipe.composer(every_object=True),
        evaluator=options.evaluator,
        device=recipe.device,
    )
    command = f"python -m models.recipe figures --model {options.model} --setting {options.setting}"
    print(figures.measure(chosen_parts(options.parts), command))


if __name__ == "__main__":
    sys.exit(main())
