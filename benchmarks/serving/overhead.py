"""What one image costs on top of the same pipeline in process, step by step to the server.

The ways take turns, a new order every round, so that a machine that warms up or is busy for a while
does so for all of them; the overhead of a way is the median over rounds of its difference to the
pipeline in the same round. Where its memory happens to lie makes a process some percent faster or
slower for its life, so all of them are started anew several times. One image at a time: nothing
waits for anything else. The goal for the server is at most 1 % or 5 ms, whichever is more.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.peers import PROMPT, example_concept
from benchmarks.serving.server_process import RunningServer, running_server
from benchmarks.serving.settings import Settings
from benchmarks.serving.spread import spread
from engine.batching.batcher import Batcher, Model, generate
from engine.concepts import concept_to_bytes
from engine.images import encode_image
from engine.pipeline import Pipeline, sound
from engine.planner import Planner
from engine.requests import GenerationRequest
from engine.worker.remote_model import open_remote
from protos.oneword.v1.generation_pb2 import (
    ConceptReference,
    GenerateImagesRequest,
    GenerateRequest,
    InlineConcept,
)

SAMPLER, GUIDANCE_SCALE = "ddim", 4.0
GOAL_SHARE, GOAL_MS = 0.01, 5.0
INSTANCES = 5  # of each process
IN_PROCESS = "pipeline in process"
PAUSE_S = 0.03  # ONNX Runtime's threads spin for a while after a call: not into the next way's time

Draw = Callable[[int], Any]  # draws the image of a seed, as a PNG file


def measure(settings: Settings) -> dict[str, Any]:
    numbers = [
        range(start, settings.overhead_rounds, INSTANCES)
        for start in range(min(INSTANCES, settings.overhead_rounds))
    ]
    rounds = list[dict[str, float]]()
    for own in tqdm(numbers, desc="overhead", unit="instance"):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            ways = _Ways(settings, stack, Path(folder)).open()
            for draw in (*ways.values(), *ways.values()):
                draw(0)
            rounds += [_round(ways, number) for number in own]
    alone_ms = statistics.median(one[IN_PROCESS] for one in rounds)
    goal_ms = max(GOAL_MS, GOAL_SHARE * alone_ms)
    return {
        "num_inference_steps": settings.overhead_steps,
        "rounds": settings.overhead_rounds,
        "instances": len(numbers),
        "goal_ms": goal_ms,
        "ways": {
            name: {
                "image_ms": spread([one[name] for one in rounds]),
                "overhead_ms": spread([one[name] - one[IN_PROCESS] for one in rounds]),
            }
            for name in rounds[0]
        },
    }


def _round(ways: dict[str, Draw], number: int) -> dict[str, float]:
    """Milliseconds of one image each."""
    order = list(ways)
    random.Random(number).shuffle(order)
    found = dict[str, float]()
    for name in order:
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        ways[name](number)
        found[name] = 1e3 * (time.perf_counter() - started)
    return {name: found[name] for name in ways}


class _Ways:
    """The same image on ways that have more and more around the pipeline."""

    def __init__(self, settings: Settings, stack: ExitStack, folder: Path) -> None:
        self._bundle, self._steps = settings.bundle, settings.overhead_steps
        self._stack, self._folder = stack, folder
        self._pipeline = Pipeline.open(settings.bundle)
        self._concept = example_concept(self._pipeline.bundle.manifest.text.dim)

    def open(self) -> dict[str, Draw]:
        planner, model = open_remote(self._bundle)
        self._stack.callback(model.close)
        ways: dict[str, Draw] = {
            IN_PROCESS: self._draw_here,
            "batcher": self._through_batcher(self._pipeline, self._pipeline),
            "batcher, model process": self._through_batcher(planner, model),
        }
        for name, model_process in (("server", False), ("server, model process", True)):
            server = self._stack.enter_context(
                running_server(
                    self._folder, name=name, bundle=self._bundle, model_process=model_process
                )
            )
            ways[f"{name}, streamed"] = lambda seed, server=server: self._stream(server, seed)
            ways[f"{name}, unary"] = lambda seed, server=server: self._call(server, seed)
        return ways

    def _draw_here(self, seed: int) -> bytes:
        images = self._pipeline.begin(self._pipeline.plan(self._request(seed)))
        while not images[0].is_done:
            self._pipeline.step(images)
        return encode_image(sound(self._pipeline.decode(images))[0])

    def _through_batcher(self, planner: Planner, model: Model) -> Draw:
        batcher = Batcher(model)
        self._stack.callback(batcher.close)

        def draw(seed: int) -> bytes:
            return encode_image(generate(batcher, planner.plan(self._request(seed)))[0][0].image)

        return draw

    def _stream(self, server: RunningServer, seed: int) -> bytes:
        (image,) = (
            event.image.image
            for event in server.generation.Generate(self._message(seed))
            if event.HasField("image")
        )
        return image

    def _call(self, server: RunningServer, seed: int) -> bytes:
        request = GenerateImagesRequest(request=self._message(seed))
        return server.generation.GenerateImages(request).images[0].image

    def _request(self, seed: int) -> GenerationRequest:
        return GenerationRequest(
            prompt=PROMPT,
            concepts=(self._concept,),
            seed=seed,
            sampler=SAMPLER,
            num_inference_steps=self._steps,
            guidance_scale=GUIDANCE_SCALE,
        )

    def _message(self, seed: int) -> GenerateRequest:
        content = concept_to_bytes(self._concept)
        return GenerateRequest(
            prompt=PROMPT,
            concepts=[ConceptReference(inline=InlineConcept(safetensors=content))],
            seed=seed,
            sampler=SAMPLER,
            num_inference_steps=self._steps,
            guidance_scale=GUIDANCE_SCALE,
        )
