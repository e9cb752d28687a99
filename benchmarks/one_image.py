"""One image at a time: latency of each system, in alternating rounds."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers import Peer, Work

MIN_PSNR_DB = 40.0


def measure(peers: Sequence[Peer], *, rounds: int = 15) -> dict[str, Any]:
    """Median and quartiles in ms of each peer; rounds alternate, so that noise hits all alike."""
    for peer in peers:
        peer.draw([Work(seed=0)])
    check_same_images(peers)
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for number in range(rounds):
        for peer in peers:
            started = time.perf_counter()
            peer.draw([Work(seed=number)])
            times[peer.name].append(1e3 * (time.perf_counter() - started))
    return {name: _quartiles(values) for name, values in times.items()}


def check_same_images(peers: Sequence[Peer]) -> None:
    """All systems must do the same work: their images agree."""
    reference, *others = (peer.draw([Work(seed=7)])[0] for peer in peers)
    for other in others:
        psnr = 10 * np.log10(1.0 / ((other - reference) ** 2).mean())
        if psnr < MIN_PSNR_DB:
            raise SystemExit(f"the images differ ({psnr:.1f} dB): nothing was compared")


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median_ms": median, "q1_ms": low, "q3_ms": high}
