"""Latency and goodput against load, a line for each system."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from benchmarks.panels import Curve, Panel, draw_panels

Point = dict[str, Any]  # of one system under one load (benchmarks/serving/open_loop.py)
Value = Callable[[Point], float]
Loads = dict[str, dict[str, Point]]  # by share of the capacity and system


def draw_load_figure(latency: Loads, load: Loads) -> Image.Image:
    """Three panels beside each other: patient callers in two, callers with deadlines in one."""
    panels: list[tuple[str, Loads, Value]] = [
        ("median latency, ms", latency, lambda point: point["latency_ms"].get("median", 0.0)),
        ("p99 latency, ms", latency, lambda point: point["latency_ms"].get("p99", 0.0)),
        ("images in time, 1/s", load, lambda point: point["goodput_per_s"]),
    ]
    shares = [100.0 * float(share) for share in load]
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
            for title, loads, value in panels
        ]
    )
