"""`oneword learn`: from a folder of images to a concept file."""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

import torch
from tqdm import tqdm

from engine.concepts import check_placeholder_token, write_concept
from engine.files import write_atomically
from engine.printing import printable
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.errors import CheckpointError, Diverged, LearningError, NoGradient
from trainer.images import TrainingImages, read_images
from trainer.initializer_search import RankedWord
from trainer.learn_arguments import add_learn_options, options_from
from trainer.learning import MAX_ROWS, learn
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions
from trainer.placement import place
from trainer.precision import Precision, unet_dtype
from trainer.presets import check_captions
from trainer.provenance import concept_metadata
from trainer.quiet import quiet_libraries
from trainer.run import LearnState
from trainer.sampling import image_size, png_bytes, sample_images, side_by_side
from trainer.splicing import as_concept
from trainer.terminal import Terminated, sigterm_raises

_INTERRUPTED = 130  # the shell's exit codes: Ctrl-C,
_TERMINATED = 143  # and SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `oneword learn`; their defaults are those of `LearnOptions`."""
    parser.description = "Learn a new word from a few images of one thing or style."
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder with 3 to 5 images")
    parser.add_argument("--placeholder-token", required=True, help="the new word, such as '<cat>'")
    parser.add_argument("--model", required=True, help="diffusers folder or hub id")
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--output", type=Path, required=True, help="concept file to write")
    add_learn_options(parser)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.checkpoint")
    parser.add_argument(
        "--checkpoint-every", type=_positive, default=100, metavar="N", help="steps (%(default)s)"
    )
    parser.add_argument(
        "--preview-every", type=_positive, metavar="N", help="draw previews every N steps (never)"
    )
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
    options = options_from(arguments)
    check_placeholder_token(arguments.placeholder_token)
    job = _Job.prepare(arguments, options)
    try:
        with sigterm_raises():
            state = job.learn()
    except Terminated:
        return _TERMINATED
    except KeyboardInterrupt:
        return _INTERRUPTED
    print(job.finish(state, seconds=time.monotonic() - started))
    return 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One run of the command: everything around the loop."""

    arguments: argparse.Namespace
    options: LearnOptions
    model: DiffusionModel
    images: TrainingImages
    identity: RunIdentity
    resume_from: LearnState | None

    @classmethod
    def prepare(cls, arguments: argparse.Namespace, options: LearnOptions) -> "_Job":
        _check_output(arguments.output)
        checkpoint = _checkpoint_path(arguments.output)
        if checkpoint.exists() and not arguments.resume:
            raise CheckpointError(
                f"{checkpoint} holds an unfinished run; add --resume to go on with it, or delete it"
            )
        model = _load_model(arguments)
        images = read_images(
            arguments.images,
            size=image_size(model),
            placeholder_token=arguments.placeholder_token,
        )
        _report_images(images, image_size(model))
        captions = images.captions or ((),) * len(images.names)
        captioned = dict(zip(images.names, map(bool, captions), strict=True))
        check_captions(arguments.presets, captioned)
        identity = RunIdentity.of(
            model, images, options, placeholder_token=arguments.placeholder_token
        )
        return cls(
            arguments=arguments,
            options=options,
            model=model,
            images=images,
            identity=identity,
            resume_from=read_checkpoint(checkpoint, identity) if arguments.resume else None,
        )

    @property
    def checkpoint(self) -> Path:
        return _checkpoint_path(self.arguments.output)

    def learn(self) -> LearnState:
        """Run the loop to its end; whatever ends it early leaves a checkpoint."""
        state = self.resume_from
        try:
            with tqdm(total=self.options.steps, initial=state.step if state else 0) as bar:
                states = learn(
                    self.model,
                    self.images,
                    self.options,
                    resume_from=state,
                    max_rows=self.arguments.max_rows,
                )
                for state in states:
                    self._attend(state, bar)
        except KeyboardInterrupt as interrupt:
            why = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
            advice = "the same command with --resume goes on"
            print(f"{why} {self._saved(state, advice)}", file=sys.stderr)
            raise
        except (Diverged, NoGradient) as error:
            # Not --resume: the same step would fail again, and other settings are another run.
            advice = (
                f"delete {self.checkpoint} and start with a lower --learning-rate, since "
                "--resume would come to the same step"
            )
            raise type(error)(f"{error}; stopped {self._saved(state, advice)}") from error
        if state is None:
            raise LearningError("the run yielded no state")
        return state

    def _attend(self, state: LearnState, bar: "tqdm[NoReturn]") -> None:
        """What happens to a state: progress bar, preview, checkpoint."""
        bar.update(state.step - bar.n)
        if state.rolled_back:
            _report_rollback(state)
        elif state.step == 0 and state.initializers:
            _report_initializers(state.initializers)
        # Before step 1 there is none, nor where the run was rolled back.
        loss = {} if math.isnan(state.loss) else {"loss": f"{state.loss:.4f}"}
        bar.set_postfix(loss, best=f"{state.best_evaluation_loss:.4f}")
        every = self.arguments.preview_every
        if every and state.step % every == 0:
            self._write_preview(state)
        if state.step and state.step % self.arguments.checkpoint_every == 0:
            write_checkpoint(self.checkpoint, state, self.identity)

    def _saved(self, state: LearnState | None, advice: str) -> str:
        """Save what there is; says when it was, where it is, and what to do with it."""
        if state is None:
            return "before the first step; nothing to save"
        write_checkpoint(self.checkpoint, state, self.identity)
        return f"after step {state.step}; state and best vectors are in {self.checkpoint}; {advice}"

    def _write_preview(self, state: LearnState) -> None:
        concept = as_concept(
            self.model, state.word_vectors, placeholder_token=self.arguments.placeholder_token
        )
        prompts = [f"a photo of {self.arguments.placeholder_token}"] * 4
        drawn = sample_images(self.model, concept, prompts, size=image_size(self.model))
        output: Path = self.arguments.output
        path = output.with_name(f"{output.stem}.step-{state.step:05d}.png")
        write_atomically(path, png_bytes(side_by_side(drawn)))

    def finish(self, state: LearnState, *, seconds: float) -> str:
        """Write the concept, remove the checkpoint, and say what came out."""
        if state.best_step == 0:
            _warn_nothing_learned(self.arguments.placeholder_token)
        concept = as_concept(
            self.model,
            state.best_vectors,
            placeholder_token=self.arguments.placeholder_token,
            metadata=concept_metadata(state, self.options, self.images, self.model),
        )
        write_concept(concept, self.arguments.output)
        self.checkpoint.unlink(missing_ok=True)
        return (
            f"evaluation loss {state.initial_evaluation_loss:.4f} -> "
            f"{state.best_evaluation_loss:.4f} (step {state.best_step} of {state.step}), "
            f"{seconds:.0f} s; wrote {printable(self.arguments.output)}"
        )


def _report_initializers(initializers: Sequence[RankedWord]) -> None:
    words = ", ".join(f"{printable(word)} {loss:.4f}" for word, loss in initializers)
    tqdm.write(f"starts from the first of these words (with their evaluation losses): {words}")


def _report_rollback(state: LearnState) -> None:
    tqdm.write(
        f"a loss was not a number: back at step {state.step}, learning rate halved "
        f"({state.rollbacks} times so far)",
        file=sys.stderr,
    )


def _warn_nothing_learned(placeholder_token: str) -> None:
    print(
        f"nothing was learned: no evaluation was better than the one before the first step, so "
        f"{placeholder_token} is still its initializer; lower --learning-rate or give more "
        "--steps",
        file=sys.stderr,
    )


def _checkpoint_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.checkpoint")


def _check_output(output: Path) -> None:
    """Find out now, not after the last step, that the output cannot be written."""
    if output.is_dir():
        raise LearningError(f"--output {output} is a folder; name a file, such as x.safetensors")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(probe := output.with_name(f".{output.name}.probe"), b"")
        probe.unlink()
    except OSError as error:
        raise LearningError(f"cannot write to {output.parent}: {error.strerror}") from error
    if output.exists():
        print(f"{printable(output)} exists and will be overwritten", file=sys.stderr)


def _load_model(arguments: argparse.Namespace) -> DiffusionModel:
    dtype = unet_dtype(arguments.precision, arguments.device)
    model = load_model(arguments.model, revision=arguments.revision, unet_dtype=dtype)
    if arguments.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return place(model, arguments.device)


def _report_images(images: TrainingImages, size: int) -> None:
    names = ", ".join(map(printable, images.names))
    print(f"{len(images.names)} images, {size} x {size} pixels: {names}")
    if images.masked:
        print(f"  learned only where their masks are: {', '.join(map(printable, images.masked))}")
    for name, captions in zip(images.names, images.captions, strict=False):
        if captions:
            print(f"  {printable(name)}: its captions ({len(captions)}) instead of the templates")
    for name in images.upscaled:
        print(
            f"  {printable(name)} is below {size} pixels and was enlarged; a larger one is better"
        )
    for file in images.skipped:
        print(f"  skipped {printable(file.name)}: {file.reason}")
