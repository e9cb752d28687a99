"""Draws images at the same time under asyncio, and leaves a stream that has shown enough.

    python examples/clients/python_async.py "a photo of a fox" "a photo of an owl" --output out

The server is that of ONEWORD_SERVER, see docs/clients.md.
"""

import argparse
import asyncio
from contextlib import aclosing
from pathlib import Path

from engine.client import AsyncClient
from protos.oneword.v1.generation_pb2 import ImageResult


async def draw(client: AsyncClient, prompt: str, path: Path, steps: int) -> None:
    result = await client.generate(prompt=prompt, num_inference_steps=steps)
    path.write_bytes(result.images[0])
    print(path, "seed", result.summary.seeds[0])


async def first_image(client: AsyncClient, prompt: str, steps: int) -> bytes:
    """The first of several images: leaving the stream cancels the rest."""
    stream = client.stream(prompt=prompt, num_images=8, num_inference_steps=steps)
    async with aclosing(stream) as events:
        async for event in events:
            if isinstance(event, ImageResult):
                return event.image
    raise AssertionError("a stream ends with its summary, or raises")


async def main() -> None:
    parser = argparse.ArgumentParser(description="Draw images with a OneWord server.")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    async with AsyncClient.from_env(timeout_s=120) as client:
        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(arguments.prompts):
                path = arguments.output / f"{number}.png"
                group.create_task(draw(client, prompt, path, arguments.steps))
        image = await first_image(client, arguments.prompts[0], arguments.steps)
    (arguments.output / "first.png").write_bytes(image)
    print(arguments.output / "first.png")


if __name__ == "__main__":
    asyncio.run(main())
