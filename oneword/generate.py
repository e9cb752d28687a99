"""`oneword generate`: one request, to a server or to a bundle in this process."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.backends.names import BACKENDS, CPU
from engine.client import GenerationResult
from engine.client.channel import SERVER_VARIABLE
from engine.concepts import concept_to_bytes, read_concept
from engine.errors import InvalidRequest
from engine.files import write_atomically
from engine.images import ImageFormat
from engine.requests import MAX_SEED, GenerationRequest
from oneword.concepts import is_concept_file
from oneword.connection import add_security_arguments, connect
from protos.oneword.v1 import generation_pb2

_FORMATS: dict[str, ImageFormat] = {".png": "png", ".webp": "webp"}
_WIRE_FORMATS = {
    "png": generation_pb2.IMAGE_FORMAT_PNG,
    "webp": generation_pb2.IMAGE_FORMAT_WEBP,
}
# Flags that go into the request as they are, and the largest number that each can carry.
_NUMBERS = {
    "width": 2**32 - 1,
    "height": 2**32 - 1,
    "num_images": 2**32 - 1,
    "num_inference_steps": 2**32 - 1,
    "seed": MAX_SEED,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw, and who draws it."""
    server = os.environ.get(SERVER_VARIABLE) or None
    source = parser.add_mutually_exclusive_group(required=server is None)
    source.add_argument(
        "--server",
        default=server,
        metavar="HOST:PORT",
        help=f"ask this server (default: the environment's {SERVER_VARIABLE})",
    )
    source.add_argument("--bundle", type=Path, help="draw in this process, without a server")
    add_request_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("oneword.png"), help=".png or .webp; several images "
        "are numbered: x-0.png, x-1.png"
    )  # fmt: skip
    parser.add_argument(
        "--backend",
        help=f"with --bundle, what runs the model: {', '.join(BACKENDS)} (the first)",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long")
    add_security_arguments(parser)


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw; flags carry the names of `GenerationRequest`, and its defaults."""
    defaults = GenerationRequest(prompt="")
    parser.add_argument("prompt", help="text; `<word>` is a concept, `(word:1.3)` a weight")
    parser.add_argument(
        "--concept",
        action="append",
        default=[],
        metavar="FILE_OR_NAME",
        help="a concept file to send along, or the name of one that the server stores; repeatable",
    )
    parser.add_argument("--negative-prompt", default=defaults.negative_prompt, metavar="TEXT")
    parser.add_argument("--seed", type=int, help="0 to 2^64-1; default: random, and printed")
    parser.add_argument(
        "--num-inference-steps", type=int, default=defaults.num_inference_steps, metavar="N"
    )
    parser.add_argument("--sampler", default=defaults.sampler)
    parser.add_argument(
        "--guidance-scale", type=float, default=defaults.guidance_scale, metavar="S", help="1 = off"
    )
    parser.add_argument(
        "--guidance-interval",
        type=_interval,
        metavar="A:B",
        help="guide between these shares of the steps only, for instance 0.1:0.7; the others cost "
        "half (docs/less-work.md)",
    )
    parser.add_argument("--width", type=int, help="pixels; default: the model's own size")
    parser.add_argument("--height", type=int, help="pixels; default: the model's own size")
    parser.add_argument("--num-images", type=int, default=defaults.num_images, metavar="N")
    parser.add_argument("--init-image", type=Path, help="start from this picture (image-to-image)")
    parser.add_argument(
        "--strength", type=float, help=f"0 to 1, with --init-image; default {defaults.strength:g}"
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw, write the pictures, and say what they were drawn with."""
    if arguments.backend is not None and arguments.bundle is None:
        raise InvalidRequest("--backend goes with --bundle; a server has its own")
    request = build_request(arguments, image_format_of(arguments.output))
    check_output(arguments.output)
    bar: tqdm[Any] = tqdm(total=1, unit="step", leave=False, disable=not sys.stderr.isatty())
    with bar:
        progress = _Progress(bar, arguments.num_images)
        if arguments.bundle is None:
            with connect(arguments, timeout_s=arguments.timeout) as client:
                result = client.generate(request, on_progress=progress)
        else:
            result = generate_in_process(
                request,
                arguments.bundle,
                progress,
                backend=arguments.backend or CPU,
                timeout_s=arguments.timeout,
            )
    write_images(arguments.output, result.images)
    for line in describe(result.summary):
        print(line, file=sys.stderr)
    return 0


def write_images(output: Path, images: Sequence[bytes]) -> None:
    """Write pictures, numbered where there are several, and print their paths."""
    for path, content in zip(_paths(output, len(images)), images, strict=True):
        write_atomically(path, content)
        print(path)


def build_request(
    arguments: argparse.Namespace, image_format: ImageFormat
) -> generation_pb2.GenerateRequest:
    """The flags as a request; ranges are the server's to check."""
    request = generation_pb2.GenerateRequest(
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        concepts=[_reference(concept) for concept in arguments.concept],
        sampler=arguments.sampler,
        guidance_scale=arguments.guidance_scale,
        strength=arguments.strength,
        image_format=_WIRE_FORMATS[image_format],
    )
    for name, largest in _NUMBERS.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        if not 0 <= value <= largest:
            flag = name.replace("_", "-")
            raise InvalidRequest(f"--{flag} must be between 0 and {largest}, got {value}")
        setattr(request, name, value)
    if arguments.guidance_interval is not None:
        request.guidance_start, request.guidance_end = arguments.guidance_interval
    if arguments.init_image:
        request.init_image = arguments.init_image.read_bytes()
    return request


def _interval(text: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    try:
        return float(start), float(end)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be two shares of the schedule such as 0.1:0.7, got {text!r}"
        ) from None


def _reference(concept: str) -> generation_pb2.ConceptReference:
    """A file is sent along; anything else is the name of a stored concept."""
    if not is_concept_file(concept):
        return generation_pb2.ConceptReference(placeholder_token=concept)
    content = concept_to_bytes(read_concept(Path(concept)))
    inline = generation_pb2.InlineConcept(safetensors=content)
    return generation_pb2.ConceptReference(inline=inline)


class _Progress:
    """A bar over the steps of all images."""

    def __init__(self, bar: "tqdm[Any]", num_images: int) -> None:
        self._bar = bar
        self._num_images = num_images

    def __call__(self, progress: generation_pb2.Progress) -> None:
        self._bar.total = progress.num_steps * self._num_images
        self._bar.update()


def generate_in_process(
    request: generation_pb2.GenerateRequest,
    bundle: Path,
    on_progress: _Progress,
    *,
    backend: str = CPU,
    timeout_s: float | None = None,
) -> GenerationResult:
    """What a server would answer, without one."""
    from engine.batching.batcher import Batcher, Event, StepDone, generate
    from engine.serving.model_opening import open_here
    from engine.serving.wire import Replies, image_format_from_proto, request_from_proto
    from engine.store.concept_store import DEFAULT_TENANT, ConceptStore

    planner, model = open_here(bundle, backend=backend)
    store = ConceptStore.temporary()
    batcher = Batcher(model)
    try:
        domain_request = request_from_proto(
            request,
            store=store,
            limits=planner.limits,
            tenant=DEFAULT_TENANT,
            packed_concepts=planner.packed_concepts,
        )
        plan = planner.plan(domain_request)
        replies = Replies(
            plan=plan,
            model_name=planner.bundle.manifest.model_name,
            image_format=image_format_from_proto(request.image_format),
        )

        def listen(event: Event) -> None:
            if isinstance(event, StepDone):
                on_progress(replies.progress(event).progress)

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        images, timings = generate(batcher, plan, on_event=listen, deadline=deadline)
        return GenerationResult(
            request_id="",
            images=[replies.image(image).image.image for image in images],
            summary=replies.summary(timings).summary,
        )
    finally:
        batcher.close()
        store.close()


def describe(summary: generation_pb2.Summary) -> list[str]:
    """What a person wants to know of a finished request; cut text and concepts above all."""
    seeds = ", ".join(str(seed) for seed in summary.seeds)
    lines = [
        f"seed {seeds}; {summary.sampler}, {summary.num_inference_steps} steps, "
        f"guidance {_guidance(summary)}, {summary.width} x {summary.height}, "
        f"{summary.timings.total_ms / 1e3:.2f} s"
    ]
    for concept in summary.matched_concepts:
        lines.append(f"concept {concept.placeholder_token} {concept.concept_id[:12]}")
    for what, cut in (
        ("prompt", summary.cut_prompt),
        ("negative prompt", summary.cut_negative_prompt),
    ):
        if cut:
            lines.append(f"the {what} was too long; not used: {json.dumps(cut)}")
    return lines


def _guidance(summary: generation_pb2.Summary) -> str:
    start, end = summary.guidance_start, summary.guidance_end
    if (start, end) in ((0.0, 1.0), (0.0, 0.0)):  # all of it; or a server that does not say
        return f"{summary.guidance_scale:g}"
    return f"{summary.guidance_scale:g} from {start:g} to {end:g}"


def image_format_of(output: Path) -> ImageFormat:
    """The format that the name of a file asks for; raises `InvalidRequest`."""
    if output.suffix.lower() not in _FORMATS:
        raise InvalidRequest(f"--output must end in .png or .webp, got {str(output)!r}")
    return _FORMATS[output.suffix.lower()]


def check_output(output: Path) -> None:
    """Find out now, not after the last step, that the pictures cannot be written."""
    if output.is_dir():
        raise InvalidRequest(f"--output {output} is a folder; name a file in it")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise InvalidRequest(f"--output {output}: {output.parent} is not a folder to write to")


def _paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]
