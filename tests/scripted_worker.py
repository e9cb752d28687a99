"""A learning process that behaves as its training's initializer token says, in a tenth of a second.

It keeps the contract of `trainer.training_worker` (folder, reports, exit codes) without PyTorch, so
that what a server does about processes can be tested by the dozen.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from engine.concepts import Concept, write_concept
from engine.training.folder import TrainingFolder
from engine.training.reports import Failure, Progress, Report, to_line
from tests.fakes import DIM

STEPS = 5
FLOOD_STEPS, PREVIEW_BYTES = 3000, 300_000


def report(report: Report) -> None:
    sys.stdout.buffer.write(to_line(report))
    sys.stdout.buffer.flush()


def progress(step: int, preview_step: int = 0) -> Progress:
    return Progress(
        step=step,
        steps=STEPS,
        loss=0.5 / step,
        initial_evaluation_loss=1.0,
        best_evaluation_loss=1.0 / step,
        best_step=step,
        preview_step=preview_step,
    )


def count_attempts(folder: TrainingFolder) -> int:
    """Note what the server has counted on disk by now; returns how many processes there were."""
    path = folder.path / "attempts"
    before = path.read_text() if path.exists() else ""
    path.write_text(before + str(folder.read_state().attempts))
    return len(before) + 1


def finish(folder: TrainingFolder) -> None:
    concept = Concept(
        placeholder_token=folder.read_record().spec.placeholder_token,
        learned_embeddings=np.full((1, DIM), 0.25, np.float32),
    )
    write_concept(concept, folder.concept)


def hold(folder: TrainingFolder) -> None:
    """Wait to be released, or for SIGTERM."""
    while not (folder.path / "release").exists():
        time.sleep(0.01)


def main(folder: TrainingFolder) -> int:
    behaviour = folder.read_record().spec.options.get("initializer_token", "")
    attempts = count_attempts(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    match behaviour:
        case "hold":
            report(progress(1))
            hold(folder)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            report(progress(1))
            hold(folder)
        case "killed":
            report(progress(1))
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed once" if attempts == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "refuses":
            report(Failure(reason="the loss is NaN; lower it", retryable=False))
            return 1
        case "babbles":
            print("this is no report", flush=True)
            hold(folder)
        case "ends without a result":
            return 0
        case "wide":
            concept = Concept(
                placeholder_token=folder.read_record().spec.placeholder_token,
                learned_embeddings=np.zeros((1, DIM + 1), np.float32),
            )
            write_concept(concept, folder.concept)
            return 0
        case "floods":
            folder.preview.write_bytes(bytes(PREVIEW_BYTES))
            for step in range(1, FLOOD_STEPS + 1):
                report(progress(step, preview_step=step))
        case _:
            for step in range(1, STEPS + 1):
                report(progress(step))
    finish(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(TrainingFolder(Path(sys.argv[-1]))))
