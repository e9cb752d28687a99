"""`make bench`: measure everything on this machine and write the report.

python -m benchmarks.run [--output docs/benchmarks/cpu.md] [--requests N] [--rounds N]
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import concepts, memory, one_image, stream
from benchmarks.peers import BUNDLE, MODEL, ROOT, Diffusers, OneWord
from engine.files import write_atomically
from engine.sessions import usable_cores

LOADS = (0.5, 1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "cpu.md")
    parser.add_argument("--requests", type=int, default=60, help="requests of each stream")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of one image")
    arguments = parser.parse_args()
    from trainer.export import build_bundle

    build_bundle(str(MODEL), BUNDLE, precision="fp32")
    results = measure(rounds=arguments.rounds, requests=arguments.requests)
    write_atomically(arguments.output, report(results).encode())
    write_atomically(arguments.output.with_suffix(".json"), json.dumps(results, indent=2).encode())
    print(report(results))


def measure(*, rounds: int, requests: int) -> dict[str, Any]:
    results: dict[str, Any] = {"machine": machine(), "memory": memory.measure()}
    with tempfile.TemporaryDirectory() as folder:
        oneword, diffusers = OneWord(), Diffusers(Path(folder))
        results["one_image"] = one_image.measure([oneword, diffusers], rounds=rounds)
        results["concepts"] = concepts.measure(oneword, diffusers)
        alone_ms = results["one_image"][diffusers.name]["median_ms"]
        oneword.close()
    results["stream"] = stream.measure(alone_ms=alone_ms, loads=LOADS, count=requests)
    return results


def machine() -> dict[str, Any]:
    names = ("torch", "diffusers", "onnxruntime", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def report(results: dict[str, Any]) -> str:
    """The results as a page; every figure in it comes from `results`."""
    info = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    lines = [
        "# Beside diffusers, on a CPU",
        "",
        f"`make bench`, {info['date']}, {info['processor']}, {info['cores']} cores, "
        f"{info['memory_gb']} GB; {versions}. The embedded model, 64 x 64, float32, DDIM with "
        "guidance: all systems draw the same images (checked, 40 dB PSNR). Medians; the ratio is "
        "to diffusers in the same run, above 1 where OneWord is better.",
        "",
        *_one_image(results),
        *_concepts(results["concepts"]),
        *_stream(results["stream"]),
    ]
    return "\n".join(lines) + "\n"


def _one_image(results: dict[str, Any]) -> list[str]:
    times, memories = results["one_image"], results["memory"]
    ours, theirs = times["oneword"], times["diffusers eager"]
    our_memory, their_memory = memories["oneword"], memories["diffusers eager"]
    rows = [
        ("one image, 20 steps, ms", ours["median_ms"], theirs["median_ms"]),
        ("peak memory of the process, MB", our_memory["peak_mb"], their_memory["peak_mb"]),
        ("process with three images, start to end, s", our_memory["process_s"],
         their_memory["process_s"]),
    ]  # fmt: skip
    return [
        "## One image",
        "",
        "| | OneWord | diffusers eager | ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {a:.3g} | {b:.3g} | {b / a:.2f} |" for name, a, b in rows),
        "",
        f"Quartiles of one image: OneWord {ours['q1_ms']:.0f} to {ours['q3_ms']:.0f} ms, "
        f"diffusers {theirs['q1_ms']:.0f} to {theirs['q3_ms']:.0f} ms.",
        "",
    ]


def _concepts(costs: dict[str, float]) -> list[str]:
    return [
        "## Another concept",
        "",
        "| | median ms |",
        "|---|---|",
        "| OneWord: read a prompt with a plain word (tokenize, look up, lay out) "
        f"| {costs['oneword_with_word_ms']:.3f} |",
        "| OneWord: the same with a concept in the word's place (the splice is the difference) "
        f"| {costs['oneword_with_concept_ms']:.3f} |",
        "| OneWord: find one of 1,000 stored concepts, tokenize the prompt, splice "
        f"| {costs['oneword_read_prompt_ms']:.3f} |",
        "| diffusers: load and unload a concept (grows and shrinks tokenizer and table) "
        f"| {costs['diffusers_load_and_unload_ms']:.1f} |",
        "",
    ]


def _stream(streams: dict[str, Any]) -> list[str]:
    lines = [
        "## A stream of images at random arrival",
        "",
        f"Exponential gaps; {', '.join(map(str, stream.STEPS))} steps at random. Load 1 is "
        f"{streams['capacity_images_per_s']:.2f} images/s: what diffusers draws one by one. "
        "diffusers can join only requests of equal step counts. Each system in its own process.",
        "",
        "| load | system | p50 ms | p95 ms | images/s |",
        "|---|---|---|---|---|",
    ]
    for load, systems in streams["loads"].items():
        for name, row in systems.items():
            lines.append(
                f"| {load} | {name} | {row['p50_ms']:.0f} | {row['p95_ms']:.0f} "
                f"| {row['images_per_s']:.2f} |"
            )
    return lines


if __name__ == "__main__":
    main()
