"""The systems that are compared, and how each is started."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.inference.cases import Prepared
from benchmarks.inference.environments import python_of
from benchmarks.inference.processes import Worker, running_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSpec:
    """One row of the table."""

    name: str
    script: str  # of benchmarks/inference/workers
    precision: str
    packages: tuple[str, ...]
    environment: str | None = None  # None: this one
    settings: dict[str, str] = field(default_factory=dict[str, str])
    bundle: str = "fp32"
    is_exact: bool = True  # float32: its answers must be ours

    def python(self, cache: Path) -> Path:
        return python_of(self.environment, cache)

    def settings_for(self, prepared: Prepared, cache: Path) -> dict[str, Any]:
        """What its worker is told; its environment and files are made on the way."""
        self.python(cache)
        return {
            **prepared.settings,
            **self.settings,
            "bundle": str(prepared.bundle(self.bundle)) if self.script == "oneword.py" else "",
            "exported": str(prepared.shared / "optimum"),
            "model": str(prepared.model_for(self.environment)),
        }

    def start(self, prepared: Prepared, cache: Path) -> AbstractContextManager[Worker]:
        """The worker, until the block ends."""
        return running_worker(
            self.name.replace(" ", "-"),
            self.python(cache),
            self.script,
            prepared.folder / "work",
            self.settings_for(prepared, cache),
        )


_DIFFUSERS = ("torch", "diffusers", "transformers")
OURS = SystemSpec(
    name="OneWord", script="oneword.py", precision="float32", packages=("onnxruntime",)
)
SYSTEMS = (
    SystemSpec(
        name="OneWord int8",
        script="oneword.py",
        precision="int8 denoiser",
        packages=("onnxruntime",),
        bundle="int8",
        is_exact=False,
    ),
    SystemSpec(
        name="diffusers eager",
        script="diffusers_pipeline.py",
        precision="float32",
        packages=_DIFFUSERS,
        settings={"kind": "eager"},
    ),
    SystemSpec(
        name="diffusers compiled",
        script="diffusers_pipeline.py",
        precision="float32",
        packages=_DIFFUSERS,
        settings={"kind": "compiled"},
    ),
    SystemSpec(
        name="optimum-onnx",
        script="diffusers_pipeline.py",
        precision="float32",
        packages=("optimum-onnx", "onnxruntime", *_DIFFUSERS),
        environment="optimum-onnx",
        settings={"kind": "optimum"},
    ),
    SystemSpec(
        name="OneWord openvino",
        script="oneword.py",
        precision="float32",
        packages=("openvino",),
        settings={"backend": "openvino"},
    ),
    SystemSpec(
        name="diffusers bfloat16",
        script="diffusers_pipeline.py",
        precision="bfloat16",
        packages=_DIFFUSERS,
        settings={"kind": "bfloat16"},
        is_exact=False,
    ),
    SystemSpec(
        name="OneWord openvino-bf16",
        script="oneword.py",
        precision="bfloat16 inside",
        packages=("openvino",),
        settings={"backend": "openvino-bf16"},
        is_exact=False,
    ),
    SystemSpec(
        name="OneWord int8 openvino-bf16",
        script="oneword.py",
        precision="int8 denoiser, else bfloat16",
        packages=("openvino",),
        settings={"backend": "openvino-bf16"},
        bundle="int8",
        is_exact=False,
    ),
)
