"""What it takes to be there: size on disk, import time, cold start to the first image, memory.

    python -m benchmarks.footprint [--optimum-python PYTHON --optimum-model DIR] [--runs N]

Each figure is of a fresh process, the median of several runs, system after system in turns. The
runtime is measured as it is installed here; `oneword` draws from its bundle, diffusers from its
folder, optimum from its export (in an environment of its own, docs/bundles-from-elsewhere.md). The
page cache is warm for all: what is measured is not the disk.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import BUNDLE, MODEL, ROOT
from benchmarks.run import machine
from oneword.pack_requirements import closure

PROMPT = "a photo of a dog"
_TAIL = """
status = open("/proc/self/status").read()
memory = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in status.splitlines()
          if line.startswith(("VmHWM", "VmRSS"))}
import json, sys
print(json.dumps({"import_s": imported - began, "image_s": drawn - began, **memory,
                  "torch": "torch" in sys.modules}))
"""
_ONEWORD = """
import time; began = time.perf_counter()
from engine.batching.batcher import Batcher, generate
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest
from pathlib import Path
imported = time.perf_counter()
pipeline = Pipeline.open(Path(SOURCE)); batcher = Batcher(pipeline)
generate(batcher, pipeline.plan(GenerationRequest(prompt=PROMPT, num_inference_steps=20)))
drawn = time.perf_counter(); batcher.close()
"""
_PIPELINE = """
import time; began = time.perf_counter()
{imports}
imported = time.perf_counter()
pipe = {load}
pipe.set_progress_bar_config(disable=True)
pipe(PROMPT, num_inference_steps=20)
drawn = time.perf_counter()
"""
_DIFFUSERS = _PIPELINE.format(
    imports="import torch; from diffusers import StableDiffusionPipeline",
    load="StableDiffusionPipeline.from_pretrained(SOURCE, safety_checker=None)",
)
_OPTIMUM = _PIPELINE.format(
    imports="from optimum.onnxruntime import ORTStableDiffusionPipeline",
    load="ORTStableDiffusionPipeline.from_pretrained(SOURCE)",
)
_SIZE = """
import importlib.metadata as m, json, sys
print(json.dumps(sum((m.distribution(n).locate_file(f)).stat().st_size for n in NAMES
      for f in m.distribution(n).files or [] if m.distribution(n).locate_file(f).is_file())))
"""
# What `pip install` of each brings, by the metadata of what is installed.
_ROOTS = {
    "oneword": ["oneword[cpu]"],
    "diffusers": ["torch", "diffusers", "transformers", "accelerate"],
}


def measure(systems: Mapping[str, tuple[str, str, Path]], runs: int) -> dict[str, dict[str, Any]]:
    """Systems are (Python, program, model) by name."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for _ in range(runs + 1):
        for name, (python, program, source) in systems.items():
            code = f"SOURCE, PROMPT = {str(source)!r}, {PROMPT!r}\n{program}\n{_TAIL}"
            started = time.perf_counter()
            done = subprocess.run(
                [python, "-W", "ignore", "-c", code],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            one = json.loads(done.stdout.splitlines()[-1])
            found[name].append(one | {"process_s": time.perf_counter() - started})
    keys = ("import_s", "image_s", "process_s", "VmRSS", "VmHWM")
    return {
        # The first run fills the page cache.
        name: {key: median(one[key] for one in values[1:]) for key in keys}
        | {"torch": values[0]["torch"]}
        for name, values in found.items()
    }


def installed_mb(python: str, names: list[str]) -> float:
    """The files of these packages, without what pip compiles of them."""
    code = f"NAMES = {names!r}\n{_SIZE}"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout) / 1e6


def folder_mb(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6


def report(
    results: dict[str, dict[str, Any]],
    sizes: Mapping[str, float | None],
    models: Mapping[str, Path],
) -> str:
    about = machine()
    head = (
        f"{about['cores']} cores of {about['processor']}, {about['date']}; embedded model, "
        "float32, 20 steps, 64 px; a fresh process each, medians.\n\n"
        "| | installed, MB | model, MB | import, s | start to first image, s | resident then, MB "
        "| peak, MB | PyTorch loaded |\n|---|---|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {name} | {_mb(sizes.get(name))} | {folder_mb(models[name]):.0f} "
        f"| {one['import_s']:.2f} | {one['image_s']:.2f} | {one['VmRSS']:.0f} | {one['VmHWM']:.0f} "
        f"| {'yes' if one['torch'] else 'no'} |\n"
        for name, one in results.items()
    ]
    return head + "".join(lines)


def _mb(size: float | None) -> str:
    return "not measured" if size is None else f"{size:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimum-python", help="Python of an environment with optimum-onnx")
    parser.add_argument("--optimum-model", type=Path, help="the embedded model, exported by it")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    systems = {
        "oneword": (sys.executable, _ONEWORD, BUNDLE),
        "diffusers": (sys.executable, _DIFFUSERS, MODEL),
    }
    sizes: dict[str, float | None] = {
        name: installed_mb(sys.executable, _everything(roots)) for name, roots in _ROOTS.items()
    }
    if arguments.optimum_python:
        systems["optimum"] = (arguments.optimum_python, _OPTIMUM, arguments.optimum_model)
        sizes["optimum"] = installed_mb(
            arguments.optimum_python,
            _all_of(arguments.optimum_python, besides=("pip", "setuptools")),
        )
    results = measure(systems, arguments.runs)
    print(report(results, sizes, {name: one[2] for name, one in systems.items()}), end="")


def _everything(roots: list[str]) -> list[str]:
    return closure(roots, refused=())


def _all_of(python: str, *, besides: tuple[str, ...]) -> list[str]:
    """All that is installed in an environment that is there for one thing."""
    code = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps([d.name for d in m.distributions()]))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return [name for name in json.loads(done.stdout) if name not in besides]


if __name__ == "__main__":
    main()
