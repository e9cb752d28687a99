"""One build of a bundle: its inputs, and the telling and timing of its stages."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.component_memory import Residence
from trainer.model import DiffusionModel
from trainer.onnx_graphs import Graph

Precision = Literal["fp32", "fp16", "int8"]
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildJob:
    """Everything that the steps of one build share."""

    model: DiffusionModel
    graphs: list[Graph]
    precision: Precision
    samplers: tuple[str, ...]
    max_steps: int
    samplers_key: str
    build_key: str
    output: Path
    progress: Progress
    residence: Residence = field(default_factory=Residence)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Tell `progress` of a stage and take its time; in between it counts in its own units."""
        self.progress(name, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.progress(name, 1, 1)
