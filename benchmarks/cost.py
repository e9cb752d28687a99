"""What a call and an image cost, by rows, pixels and steps: measured, fitted, plotted.

    python -m benchmarks.cost [--rounds N] [--cache FOLDER] [--output FILE]

A float32 UNet of Stable Diffusion 1.5's size with random weights in ONNX Runtime on this CPU, alone
on the machine: some 12 GB of memory, 8 GB of disk (shared with benchmarks.inference). Calls take
turns, and the least of the rounds is kept: other users of a machine only ever add. The fit is
t = c + rows (a p + b p^2) with p in thousands of latent pixels: convolutions and products with
weights grow with p, attention with its square. It is made over all calls at once and minimizes
relative errors.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inference.cases import CASES, prepare
from benchmarks.panels import Curve, Panel, draw_panels
from benchmarks.peers import ROOT
from benchmarks.run import machine
from engine.batching.batcher import Batcher, generate
from engine.bundle import Bundle
from engine.files import write_atomically
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest
from engine.sessions import Session
from trainer.quiet import quiet_libraries
from trainer.tradeoff_figure import figure_png

ROWS, PIXELS, STEPS = (1, 2, 4, 8, 16), (256, 384, 512, 640, 768), (1, 2, 5, 10, 20, 50)
SMALLEST = PIXELS[0]
BETWEEN = ((4, 512), (2, 768))  # rows and pixels that are on neither line
Call = tuple[int, int]  # rows, pixels of a side


def measure(bundle_path: Path, *, rounds: int) -> dict[str, Any]:
    calls: list[Call] = [(rows, SMALLEST) for rows in ROWS]
    calls += [(1, pixels) for pixels in PIXELS[1:]]
    calls += BETWEEN
    times = _measure_calls(Bundle.open(bundle_path), calls, rounds)
    fit = fit_calls(times)
    images = _measure_images(bundle_path, rounds)
    slope, start = (float(value) for value in np.polyfit([*images], [*images.values()], 1))
    return {
        "rounds": rounds,
        "calls": [
            {"rows": rows, "pixels": pixels, "s": s, "fitted_s": fit(rows, pixels)}
            for (rows, pixels), s in times.items()
        ],
        "fit": {"call_s": fit.call_s, "linear_s": fit.linear_s, "square_s": fit.square_s},
        "images": [{"steps": steps, "s": s} for steps, s in images.items()],
        "image_fit": {"start_s": start, "step_s": slope},
    }


def _measure_calls(bundle: Bundle, calls: list[Call], rounds: int) -> dict[Call, float]:
    denoiser = bundle.open_session("denoiser")
    times: dict[Call, list[float]] = {call: [] for call in calls}
    for turn in range(rounds + 1):
        for call in calls if turn % 2 else reversed(calls):
            s = _call(denoiser, bundle, call)
            if turn:  # the first makes ONNX Runtime's memory
                times[call].append(s)
            print(f"round {turn} of {rounds}, {call[0]} rows, {call[1]} px: {s:.2f} s", flush=True)
    return {call: min(values) for call, values in times.items()}


def _call(denoiser: Session, bundle: Bundle, call: Call) -> float:
    rows, pixels = call
    latents, text = bundle.manifest.latents, bundle.manifest.text
    rng, side = np.random.default_rng(0), pixels // latents.scale_factor
    shapes = {
        "latents": (rows, latents.channels, side, side),
        "prompt_embeds": (rows, text.max_tokens, text.output_dim),
    }
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    feeds["timestep"] = np.linspace(900, 100, rows, dtype=np.float32)  # each row at its own step
    started = time.perf_counter()
    denoiser.run(feeds)
    return time.perf_counter() - started


def _measure_images(bundle_path: Path, rounds: int) -> dict[int, float]:
    """Seconds of an image of 256 px without guidance, by steps."""
    pipeline = Pipeline.open(bundle_path)
    batcher = Batcher(pipeline)
    times: dict[int, list[float]] = {steps: [] for steps in STEPS}
    for turn in range(rounds):
        for steps in STEPS if turn % 2 else reversed(STEPS):
            request = GenerationRequest(
                prompt=f"a dog, {turn}, {steps}", width=SMALLEST, height=SMALLEST, sampler="ddim",
                num_inference_steps=steps, guidance_scale=1.0,
            )  # fmt: skip
            started = time.perf_counter()
            generate(batcher, pipeline.plan(request))
            times[steps].append(time.perf_counter() - started)
            print(f"{steps} steps: {times[steps][-1]:.1f} s", flush=True)
    batcher.close()
    return {steps: min(values) for steps, values in times.items()}


class CallFit:
    """Seconds of a call, by rows and pixels: call_s + rows (linear_s p + square_s p^2)."""

    def __init__(self, call_s: float, linear_s: float, square_s: float) -> None:
        self.call_s, self.linear_s, self.square_s = call_s, linear_s, square_s

    def __call__(self, rows: float, pixels: float) -> float:
        latents = thousand_latents(pixels)
        return self.call_s + rows * (self.linear_s * latents + self.square_s * latents**2)


def thousand_latents(pixels: float) -> float:
    return (pixels / 8) ** 2 / 1000


def fit_calls(times: dict[Call, float]) -> CallFit:
    """Least squares of relative errors; `times` by rows and pixels of a side."""
    seconds = np.array([*times.values()])
    terms = np.array(
        [[1.0, rows * (p := thousand_latents(px)), rows * p * p] for rows, px in times]
    )
    solution = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    return CallFit(*(float(value) for value in solution))


def report(results: dict[str, Any], figure: str) -> str:
    """The results as a page; every figure in it comes from `results`."""
    info, fit, image = results["machine"], results["fit"], results["image_fit"]
    of_call = CallFit(**fit)
    worst = max(abs(call["fitted_s"] / call["s"] - 1) for call in results["calls"])
    square = {px: fit["square_s"] * thousand_latents(px) ** 2 / of_call(1, px) for px in PIXELS}
    by_rows = {c["rows"]: c["s"] for c in results["calls"] if c["pixels"] == SMALLEST}
    alone, together = by_rows[1], by_rows[max(ROWS)] / max(ROWS)
    return "\n".join(
        [
            "# Cost against work",
            "",
            f"`python -m benchmarks.cost`, {info['date']}, {info['processor']}, {info['cores']} "
            f"cores, {info['memory_gb']} GB. A float32 UNet of Stable Diffusion 1.5's size, random "
            f"weights, ONNX Runtime on the CPU; the least of {results['rounds']} rounds in turn.",
            "",
            f"![Seconds by rows, size and steps, with the fit]({figure})",
            "",
            f"Fitted to all calls at once: {fit['call_s']:.3f} s a call, and for each row "
            f"{fit['linear_s']:.3f} s for a thousand latent pixels and {fit['square_s']:.4f} s for "
            f"the square of that. The farthest call is off by {100 * worst:.0f} %.",
            "",
            "| rows | pixels | s | fit, s | s a row |",
            "|---|---|---|---|---|",
            *(
                f"| {c['rows']} | {c['pixels']} | {c['s']:.2f} | {c['fitted_s']:.2f} "
                f"| {c['s'] / c['rows']:.2f} |"
                for c in results["calls"]
            ),
            "",
            f"A row of {SMALLEST} px takes {alone:.2f} s in a call of its own and {together:.2f} s "
            f"in one of {max(ROWS)}: what is between them is all that a batch can save on a CPU, "
            "which one row keeps busy. Attention, the square, is "
            + ", ".join(f"{100 * share:.0f} % at {px} px" for px, share in square.items())
            + " of the fit's time.",
            "",
            f"An image of {SMALLEST} px without guidance takes {image['start_s']:.2f} s (prompt "
            f"and decoding) and {image['step_s']:.2f} s a step:",
            "",
            "| steps | s | line, s |",
            "|---|---|---|",
            *(
                f"| {i['steps']} | {i['s']:.2f} "
                f"| {image['start_s'] + i['steps'] * image['step_s']:.2f} |"
                for i in results["images"]
            ),
            "",
        ]
    )


def panels(results: dict[str, Any]) -> list[Panel]:
    """Rows, pixels and steps; measured beside fitted."""
    fit, image, calls = CallFit(**results["fit"]), results["image_fit"], results["calls"]
    by_rows = {float(c["rows"]): c["s"] for c in calls if c["pixels"] == SMALLEST}
    by_pixels = {float(c["pixels"]): c["s"] for c in calls if c["rows"] == 1}
    by_steps = {float(i["steps"]): i["s"] for i in results["images"]}
    return [
        _panel(f"s a call of {SMALLEST} px", "rows", by_rows, lambda x: fit(x, SMALLEST)),
        _panel("s a call of one row", "pixels of a side", by_pixels, lambda x: fit(1, x)),
        _panel(
            f"s an image of {SMALLEST} px", "steps", by_steps,
            lambda x: image["start_s"] + x * image["step_s"],
        ),
    ]  # fmt: skip


def _panel(title: str, x_label: str, measured: dict[float, float], fitted: Any) -> Panel:
    xs = np.linspace(min(measured), max(measured), 50).tolist()
    return Panel(
        title=title,
        x_label=x_label,
        x_ticks={x: f"{x:.0f}" for x in measured},
        curves={
            "measured": Curve(x=[*measured], y=[*measured.values()], has_line=False),
            "fit": Curve(x=xs, y=[fitted(x) for x in xs], has_markers=False),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=4, help="of each call (%(default)s)")
    parser.add_argument(
        "--cache", type=lambda text: Path(text).resolve(), default=ROOT / "build" / "inference",
        metavar="FOLDER", help="model and bundle (build/inference)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks" / "cost.json",
        help="JSON; page and figure are beside it",
    )  # fmt: skip
    arguments = parser.parse_args()
    quiet_libraries()
    bundle = prepare(CASES["256"], arguments.cache).bundle("fp32")
    results = measure(bundle, rounds=arguments.rounds) | {"machine": machine()}
    figure = arguments.output.with_suffix(".png")
    write_atomically(arguments.output, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(figure, figure_png(draw_panels(panels(results))))
    write_atomically(arguments.output.with_suffix(".md"), report(results, figure.name).encode())
    print(report(results, figure.name))


if __name__ == "__main__":
    main()
