"""One image of a bundle on a backend, in a process of its own: a driver may end it, and only it."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from engine import errors
from engine.backends.opening import open_model
from engine.bundle import Bundle
from engine.child_process import child_environment, describe_end
from engine.errors import EngineError, OneWordError
from engine.pipeline import sound
from engine.planner import Planner
from engine.requests import GenerationRequest, Limits

TIMEOUT_S = 600.0
_STEPS = 2


class DrawFailed(OneWordError):
    """A backend was there and failed."""


def draw_apart(bundle: Path, backend: str) -> float:
    """Seconds from nothing to an image; raises what the backend raised, or `DrawFailed`."""
    words = [sys.executable, "-P", "-m", __name__, str(bundle.resolve()), backend]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=TIMEOUT_S, env=child_environment()
        )
    except subprocess.TimeoutExpired:
        raise DrawFailed(f"no image within {TIMEOUT_S:g} s") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DrawFailed(f"its process ended {describe_end(done.returncode)}: {last}") from None
    if "seconds" in answer:
        return float(answer["seconds"])
    kind = getattr(errors, answer["kind"], None)
    if isinstance(kind, type) and issubclass(kind, EngineError):
        raise kind(answer["message"])
    raise DrawFailed(f"{answer['kind']}: {answer['message']}")


def draw(path: Path, backend: str) -> float:
    """The same in this process: one row, the model's own size, the sampler with most history."""
    started = time.perf_counter()
    bundle = Bundle.open(path)
    model = open_model(bundle, backend)
    sampler = max(bundle.sampler_tables.items(), key=lambda one: one[1].rows.shape[1])[0]
    request = GenerationRequest(
        prompt="", seed=0, sampler=sampler, num_inference_steps=_STEPS, guidance_scale=1.0
    )
    images = model.begin(Planner(bundle, limits=Limits()).plan(request))
    while not images[0].is_done:
        model.step(images)
    sound(model.decode(images))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="oneword.doctor_draw")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("backend")
    arguments = parser.parse_args()
    try:
        answer = {"seconds": draw(arguments.bundle, arguments.backend)}
    except Exception as error:
        answer = {"kind": type(error).__name__, "message": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
