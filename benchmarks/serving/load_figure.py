"""Latency and goodput against load, a line for each system."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from benchmarks.panels import Curve, Panel, draw_panels

Point = dict[str, Any]  # of one system under one load (benchmarks/serving/open_loop.py)
Value = Callable[[Point], float]
PANELS: dict[str, Value] = {
    "median latency, ms": lambda point: point["latency_ms"].get("median", 0.0),
    "p99 latency, ms": lambda point: point["latency_ms"].get("p99", 0.0),
    "images in time, 1/s": lambda point: point["goodput_per_s"],
}


def draw_load_figure(loads: dict[str, dict[str, Point]]) -> Image.Image:
    """Three panels beside each other; the loads are shares of the capacity."""
    shares = [100.0 * float(load) for load in loads]
    return draw_panels(
        [
            Panel(
                title=title,
                x_label="load, share of capacity",
                x_ticks={share: f"{share:.0f} %" for share in shares},
                curves={
                    system: Curve(x=shares, y=[value(at[system]) for at in loads.values()])
                    for system in next(iter(loads.values()))
                },
            )
            for title, value in PANELS.items()
        ]
    )
