"""`oneword learn`: from a folder of images to a concept file."""

import argparse
import time
from pathlib import Path
from typing import get_args

import torch

from trainer.learn_arguments import add_learn_options, options_from
from trainer.learn_course import add_course_options, encoder_of
from trainer.learn_job import LearnJob
from trainer.learn_joint import JointJob, add_joint_options, check_joint
from trainer.learn_tasks import tasks_of
from trainer.learn_towers import add_tower_option, guided
from trainer.learning import MAX_ROWS
from trainer.model import DiffusionModel, load_model
from trainer.placement import place
from trainer.precision import Precision, unet_dtype
from trainer.quiet import quiet_libraries
from trainer.terminal import Terminated, sigterm_raises

_INTERRUPTED = 130  # the shell's exit codes: Ctrl-C,
_TERMINATED = 143  # and SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `oneword learn`; their defaults are those of `LearnOptions`."""
    parser.description = "Learn a new word from a few images of one thing or style."
    parser.add_argument(
        "images", type=Path, nargs="?", metavar="IMAGES", help="folder with 3 to 5 images"
    )
    parser.add_argument("--placeholder-token", help="the new word, such as '<cat>'")
    parser.add_argument(
        "--concept", action="append", metavar="TOKEN=FOLDER",
        help="learn several words at once: for each its token and images, '<cat>=photos/cat'",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="diffusers folder or hub id")
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument(
        "--output", type=Path, required=True, help="concept file to write; with --concept a folder"
    )
    add_joint_options(parser)
    add_tower_option(parser)
    add_learn_options(parser)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.checkpoint")
    parser.add_argument(
        "--checkpoint-every", type=_positive, default=100, metavar="N", help="steps (%(default)s)"
    )
    parser.add_argument(
        "--preview-every", type=_positive, metavar="N", help="draw previews every N steps (never)"
    )
    add_course_options(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="PyTorch device (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="of the denoiser; auto: bfloat16 on a GPU that has it, else float32 (%(default)s)",
    )
    parser.add_argument(
        "--max-rows",
        type=_positive,
        metavar="N",
        default=MAX_ROWS,
        help="samples in one pass of the denoiser: fewer need less memory (%(default)s)",
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute the denoiser twice instead of keeping it: slower, in less memory",
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Learn as told, report, write the concept. Raises `EngineError` or `LearningError`.

    Returns 0, or after Ctrl-C 130 and after SIGTERM 143: the run has then been saved and can be
    resumed.
    """
    started = time.monotonic()
    quiet_libraries()
    jointly = check_joint(arguments)
    options = guided(options_from(arguments), arguments.image_tower)
    tasks = tasks_of(arguments)
    for task in tasks:
        task.check_files(resume=arguments.resume)
    encoder = encoder_of(arguments)
    model = _load_model(arguments)
    if jointly:
        job = JointJob.prepare(model, tasks, options, arguments)
    else:
        job = LearnJob.prepare(model, tasks, options, arguments, encoder)
    try:
        with sigterm_raises():
            job.learn()
    except Terminated:
        return _TERMINATED
    except KeyboardInterrupt:
        return _INTERRUPTED
    job.finish(started=started)
    return 0


def _load_model(arguments: argparse.Namespace) -> DiffusionModel:
    dtype = unet_dtype(arguments.precision, arguments.device)
    model = load_model(arguments.model, revision=arguments.revision, unet_dtype=dtype)
    if arguments.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return place(model, arguments.device)
