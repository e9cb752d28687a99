"""A system in a process of its own that is told over its standard input what to do next.

Stands alone (standard library and NumPy), since most systems live in environments of their own.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class System(Protocol):
    """What a worker runs."""

    def call(self, feeds: dict[str, Array]) -> Array:
        """One denoiser call: latents, timestep and prompt_embeds to noise_pred."""
        ...

    def draw(self, work: dict[str, Any]) -> Array:
        """An image [height, width, 3] in [0, 1]: prompt, seed, steps, guidance, pixels, DDIM."""
        ...

    def peak(self) -> float:
        """The rate of the system's own float32 matrix product in GFLOP/s; 0 where unknown."""
        ...


def serve(system: System, settings: dict[str, Any]) -> None:
    """Answer `call`, `draw` and `peak`, a line of JSON each, until the input ends."""
    feeds = dict(np.load(settings["feeds"]))
    folder = Path(settings["answers"])
    # What libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        if asked["do"] == "call":
            result = system.call(feeds)
        elif asked["do"] == "draw":
            result = system.draw(settings | asked)
        else:
            result = np.array(max(numpy_gflops(), system.peak()))
        answer: dict[str, Any] = {"ms": 1e3 * (time.perf_counter() - started)}
        if asked["do"] == "peak":
            answer["gflops"] = float(result)
        if asked.get("keep"):
            np.save(folder / f"{settings['name']}-{asked['do']}.npy", np.asarray(result))
        print(json.dumps(answer), file=answers, flush=True)


def numpy_gflops(size: int = 2048, times: int = 5) -> float:
    """The best rate of NumPy's float32 matrix product here and now, in GFLOP/s."""
    matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
    return gflops(lambda: matrix @ matrix, size, times)


def gflops(product: Callable[[], Any], size: int, times: int) -> float:
    """The best rate of a product of two square matrices, in GFLOP/s."""
    seconds: list[float] = []
    for _ in range(times):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return 2e-9 * size**3 / min(seconds)


def read_settings() -> dict[str, Any]:
    """The settings of this worker: the file that its command names."""
    return json.loads(Path(sys.argv[1]).read_text())
