"""Draws images with a OneWord server: a request, several in one call, and what can go wrong.

    python examples/clients/python_sync.py "a photo of a fox" --output out

The server is that of ONEWORD_SERVER, see docs/clients.md.
"""

import argparse
import sys
from pathlib import Path

from engine.client import Client, ServerError
from protos.oneword.v1.generation_pb2 import GenerateRequest, Progress


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw images with a OneWord server.")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    requests = [
        GenerateRequest(prompt=prompt, num_inference_steps=arguments.steps, seed=seed)
        for seed, prompt in enumerate(arguments.prompts)
    ]
    with Client.from_env(timeout_s=120) as client:
        print("model", client.server_info().model.name)
        try:
            result = client.generate(requests[0], on_progress=show)
        except ServerError as error:  # what may succeed later was tried again already
            print(f"{error.code.name} {error.reason}: {error}", file=sys.stderr)
            return 1
        write(arguments.output / "0.png", result.images[0])
        print("seed", result.summary.seeds[0], "in", round(result.summary.timings.total_ms), "ms")
        for number, outcome in enumerate(client.generate_many(requests[1:]), 1):
            if isinstance(outcome, ServerError):  # the others are drawn all the same
                print(f"{requests[number].prompt}: {outcome}", file=sys.stderr)
            else:
                write(arguments.output / f"{number}.png", outcome.images[0])
    return 0


def show(progress: Progress) -> None:
    print(f"step {progress.step} of {progress.num_steps}", file=sys.stderr)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
