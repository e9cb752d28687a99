"""What one image costs on top of the pipeline in process: through the process of a model, and
through the server. The goal is at most 1 % or 5 ms, whichever is more.

    python -m benchmarks.serving.overhead --bundle build/emoji

One image at a time, so that nothing waits for anything else. The ways take turns in short rounds,
so that a machine that warms up or is busy for a while does so for all of them, and the overhead is
the median over rounds of the difference within a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers import BUNDLE, ROOT, example_concept
from engine.batching.batcher import Batcher, Model, generate
from engine.client import Client
from engine.concepts import Concept, concept_to_bytes
from engine.images import encode_image
from engine.pipeline import Pipeline
from engine.planner import Planner
from engine.requests import GenerationRequest
from engine.worker.remote_model import open_remote
from protos.oneword.v1.generation_pb2 import ConceptReference, GenerateRequest, InlineConcept

PROMPT = "a photo of <x> on a blue background"
SAMPLER, GUIDANCE_SCALE = "ddim", 4.0
GOAL_SHARE, GOAL_MS = 0.01, 5.0
IN_PROCESS, IN_PROCESS_PNG = "in process", "in process, as PNG"
REMOTE, SERVER = "process of the model", "server"

Draw = Callable[[int], Any]  # draws the image of a seed


def measure(bundle: Path, *, num_inference_steps: int, rounds: int, images: int) -> dict[str, Any]:
    """Median time per image of each way in ms, and what each costs beyond the first."""
    with ExitStack() as stack:
        ways = _open_ways(stack, bundle, num_inference_steps)
        for draw in ways.values():
            draw(0)
        found = [
            {name: _per_image_ms(draw, images, number) for name, draw in ways.items()}
            for number in range(rounds)
        ]
    return {
        "num_inference_steps": num_inference_steps,
        "rounds": rounds,
        "images_per_round": images,
        "per_image_ms": {name: _median(one[name] for one in found) for name in ways},
        "overhead": {
            REMOTE: _overhead(found, REMOTE, IN_PROCESS),
            # The server's answer is a file, so the picture in process is made one too.
            SERVER: _overhead(found, SERVER, IN_PROCESS_PNG),
        },
    }


def _open_ways(stack: ExitStack, bundle: Path, num_inference_steps: int) -> dict[str, Draw]:
    pipeline = Pipeline.open(bundle)
    concept = example_concept(pipeline.bundle.manifest.text.dim)
    planner, model = open_remote(bundle)
    stack.callback(model.close)
    here = _through_batcher(stack, pipeline, pipeline, concept, num_inference_steps)
    return {
        IN_PROCESS: here,
        IN_PROCESS_PNG: lambda seed: encode_image(here(seed)),
        REMOTE: _through_batcher(stack, planner, model, concept, num_inference_steps),
        SERVER: _through_server(stack, bundle, concept, num_inference_steps),
    }


def _through_batcher(
    stack: ExitStack, planner: Planner, model: Model, concept: Concept, steps: int
) -> Draw:
    batcher = Batcher(model)
    stack.callback(batcher.close)

    def draw(seed: int) -> Any:
        request = GenerationRequest(
            prompt=PROMPT,
            concepts=(concept,),
            seed=seed,
            sampler=SAMPLER,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
        )
        return generate(batcher, planner.plan(request))[0][0].image

    return draw


def _through_server(stack: ExitStack, bundle: Path, concept: Concept, steps: int) -> Draw:
    client = stack.enter_context(Client(stack.enter_context(_server(bundle))))
    inline = ConceptReference(inline=InlineConcept(safetensors=concept_to_bytes(concept)))

    def draw(seed: int) -> Any:
        request = GenerateRequest(
            prompt=PROMPT,
            concepts=[inline],
            seed=seed,
            sampler=SAMPLER,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
        )
        return client.generate(request).images[0]

    return draw


@contextmanager
def _server(bundle: Path) -> Generator[str]:
    """The address of a server as the command starts it."""
    command = [sys.executable, "-m", "oneword", "serve", "--bundle", str(bundle.resolve())]
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        yield process.stdout.readline().split()[-1]
        process.terminate()


def _per_image_ms(draw: Draw, images: int, number: int) -> float:
    started = time.perf_counter()
    for index in range(images):
        draw(number * images + index)
    return 1e3 * (time.perf_counter() - started) / images


def _overhead(found: Sequence[dict[str, float]], name: str, beside: str) -> dict[str, Any]:
    overhead_ms = _median(one[name] - one[beside] for one in found)
    goal_ms = max(GOAL_MS, GOAL_SHARE * _median(one[beside] for one in found))
    return {"ms": overhead_ms, "goal_ms": goal_ms, "is_met": overhead_ms <= goal_ms}


def _median(values: Any) -> float:
    return statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description="the server's cost of one image")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=int, default=5, help="of each way in a round")
    arguments = parser.parse_args()
    result = measure(
        arguments.bundle,
        num_inference_steps=arguments.num_inference_steps,
        rounds=arguments.rounds,
        images=arguments.images,
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
