"""`oneword demo`: the whole path on the embedded model, in the commands that a user would type.

Teaches it a word from four images, builds a bundle, starts the server, asks it for images over gRPC
and writes a contact sheet and a summary.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.client import Client, GenerationResult
from engine.concepts import Concept, read_concept
from engine.errors import OneWordError
from engine.files import write_atomically
from oneword.contact_sheet import Panel, Picture, draw_contact_sheet

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("models/emoji")
IMAGES = Path("examples/concepts/fox")
LEARNED, CONTRAST = "<fox>", "a bear"
SETTINGS: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 20, "guidance_scale": 4.0}
CONCURRENT_REQUESTS = 8
SERVER_STOP_TIMEOUT_S = 60.0

# What the contact sheet shows, once with the learned word and once with one that the model knows.
PROMPTS = (
    ("the word alone", ("a photo of {}",) * 4),
    (
        "other places",
        (
            "{} on a blue background",
            "{} on the beach",
            "{} in the snow",
            "a photo of {} at night",
        ),
    ),
    (
        "another style",
        (
            "{} in flat style",
            "{} in glossy style",
            "{} in twemoji style",
            "{} on a green and white striped background",
        ),
    ),
    (
        "with another object",
        (
            "{} and a cat on a white background",
            "{} next to an apple on a white background",
            "a dog and {} on grass",
            "{} and a red car on a yellow background",
        ),
    ),
)


class DemoFailed(OneWordError):
    """A stage of the demo did not end well; its own output says why."""


@dataclass(slots=True)
class Stages:
    """Times of the stages, told as they end."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)
        print(f"== {name}: {self.seconds[name]:.1f} s\n", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=ROOT / "out" / "demo", help="folder for the results"
    )


def run(arguments: argparse.Namespace) -> int:
    """Learn, build, serve, draw; about two to four minutes on two CPU cores."""
    if not (ROOT / MODEL).is_dir():
        raise DemoFailed(f"no model at {ROOT / MODEL}; run the demo from a checkout of the project")
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    concept_path, bundle = _as_typed(output / "fox.safetensors"), Path("build/emoji")
    stages = Stages()
    with stages.stage("learn"):
        _learn(concept_path)
    with stages.stage("build"):
        _run("build_engines.py", "--model", MODEL, "--output", bundle)
    with stages.stage("start server"):
        server, address = _start_server(bundle)
    try:
        with stages.stage("generate"):
            results = _generate(address, ROOT / concept_path)
    finally:
        with stages.stage("stop server"):
            _stop(server)
    concept = read_concept(ROOT / concept_path)
    draw_contact_sheet(_bands(results)).save(output / "contact-sheet.png")
    summary = json.dumps(_summary(concept, results, stages), indent=2) + "\n"
    write_atomically(output / "summary.json", summary.encode())
    print(f"{output / 'contact-sheet.png'}\n{output / 'summary.json'}")
    return 0


def _as_typed(path: Path) -> Path:
    """A path as a user in the checkout would write it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _learn(concept_path: Path) -> None:
    resume = ["--resume"] if (ROOT / f"{concept_path}.checkpoint").exists() else []
    _run(
        *("-m", "oneword", "learn", IMAGES, "--placeholder-token", LEARNED),
        *("--model", MODEL, "--output", concept_path, *resume),
    )


def _run(*arguments: str | Path) -> None:
    """Run Python in the checkout, its output passing through, and say what is run."""
    words = [str(argument) for argument in arguments]
    print("$ python " + shlex.join(words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode:
        raise DemoFailed(f"`python {shlex.join(words)}` failed")


def _start_server(bundle: Path) -> tuple["subprocess.Popen[str]", str]:
    words = ["-m", "oneword", "serve", "--bundle", str(bundle), "--listen", "127.0.0.1:0"]
    words += ["--no-access-log"]
    print("$ python " + shlex.join(words), flush=True)
    server = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert server.stdout
    line = server.stdout.readline()  # "" if the server ends before it listens
    if not line.startswith("listening on "):
        server.kill()
        raise DemoFailed("the server did not start; its output says why")
    return server, line.removeprefix("listening on ").strip()


def _stop(server: "subprocess.Popen[str]") -> None:
    server.terminate()
    try:
        server.wait(SERVER_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()


@dataclass(frozen=True, slots=True)
class _Shot:
    """One image to ask for."""

    group: str
    word: str
    prompt: str
    seed: int


def _shots() -> list[_Shot]:
    return [
        _Shot(group, word, prompt.format(word), seed)
        for group, prompts in PROMPTS
        for word in (LEARNED, CONTRAST)
        for seed, prompt in enumerate(prompts)
    ]


def _generate(address: str, concept_path: Path) -> dict[_Shot, GenerationResult]:
    """Import the word, then send all requests at once: the server shares its calls among them."""
    with Client(address) as client:
        client.import_concept(concept_path.read_bytes())

        def ask(shot: _Shot) -> GenerationResult:
            return client.generate(prompt=shot.prompt, seed=shot.seed, **SETTINGS)

        shots = _shots()
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            results = list(tqdm(pool.map(ask, shots), total=len(shots), desc="images"))
    return dict(zip(shots, results, strict=True))


def _bands(results: dict[_Shot, GenerationResult]) -> list[list[Panel]]:
    """What the trainer saw, then each group of prompts with the word and with a known one."""
    files = sorted(path for path in (ROOT / IMAGES).iterdir() if path.suffix == ".png")
    seen = [Picture(path.read_bytes(), path.name) for path in files]
    bands = [[Panel(f"what the trainer saw: {IMAGES}", seen)]]
    for group, _ in PROMPTS:
        bands.append(
            [
                Panel(
                    f"{group}: {title}",
                    [
                        Picture(result.images[0], shot.prompt)
                        for shot, result in results.items()
                        if (shot.group, shot.word) == (group, word)
                    ],
                )
                for title, word in ((LEARNED, LEARNED), (f"for contrast, {CONTRAST}", CONTRAST))
            ]
        )
    return bands


def _summary(
    concept: Concept, results: dict[_Shot, GenerationResult], stages: Stages
) -> dict[str, Any]:
    timings = [result.summary.timings for result in results.values()]
    return {
        "model": str(MODEL),
        "images": str(IMAGES),
        "concept": {
            "placeholder_token": concept.placeholder_token,
            "concept_id": concept.concept_id,
            "num_vectors": concept.num_vectors,
            "learned": dict(concept.metadata),
        },
        "seconds": stages.seconds,
        "settings": SETTINGS,
        "generated": {
            "images": len(results),
            "images_per_second": round(len(results) / stages.seconds["generate"], 2),
            "concurrent_requests": CONCURRENT_REQUESTS,
            "mean_rows_per_denoiser_call": round(
                sum(t.mean_batch_rows for t in timings) / len(timings), 1
            ),
            "median_total_ms": round(sorted(t.total_ms for t in timings)[len(timings) // 2], 1),
        },
        "prompts": [
            {
                "prompt": shot.prompt,
                "seed": shot.seed,
                "concepts": {
                    c.placeholder_token: c.concept_id for c in result.summary.matched_concepts
                },
            }
            for shot, result in results.items()
        ],
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
    }
