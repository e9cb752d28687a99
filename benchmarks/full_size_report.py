"""docs/benchmarks/full-size.md, from what was measured."""

from typing import Any

from benchmarks.full_size_configs import FAMILIES

_INTRODUCTION = """# Models of true size

`python -m benchmarks.full_size FOLDER --family sd15|sd21|sdxl [--precision fp16]`: the configs of
the real models ([full_size_configs.py](../../benchmarks/full_size_configs.py)) with random weights
and the embedded model's vocabulary; one sampler. It speaks of cost and correctness, not of image
quality, and not of what real weights do in float16.

*Peak* is resident memory, files mapped into it included: weights that are read from the model's
files, or by ONNX Runtime from the bundle's. The system can drop those pages and read them again;
*own* is the peak without them (looked at 50 times a second).
"""


def describe(results: dict[str, Any]) -> str:
    """A section for each family and precision."""
    order = [f"{family} {precision}" for family in FAMILIES for precision in ("fp32", "fp16")]
    sections = [_section(name, results[name]) for name in order if name in results]
    return "\n".join([_INTRODUCTION, *sections])


def _section(name: str, found: dict[str, Any]) -> str:
    family, precision = name.split()
    stages = found["stages"]
    peak = max(stage["peak_mb"] for stage in stages.values())
    own = max(stage["peak_own_mb"] for stage in stages.values())
    seconds = sum(stage["seconds"] for stage in stages.values())
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    image = found["image_256_px_4_steps_s"]
    lines = [
        f"## {FAMILIES[family].title}, {'float32' if precision == 'fp32' else 'float16'}",
        "",
        f"{found['date']}, {found['processor']}, {found['cores']} cores, {found['memory_gb']} GB; "
        f"{versions}.",
        "",
        f"Peak of the build {peak / 1024:.1f} GB, own {own / 1024:.1f} GB; {seconds:.0f} s; bundle "
        f"{found['bundle_mb'] / 1024:.1f} GB.",
        "",
        "| stage | s | peak, GB | own, GB |",
        "|---|---|---|---|",
        *(
            f"| {stage} | {taken['seconds']:.0f} | {taken['peak_mb'] / 1024:.1f} "
            f"| {taken['peak_own_mb'] / 1024:.1f} |"
            for stage, taken in stages.items()
        ),
        "",
        "| parity with PyTorch | precision | largest error, relative to the output's range |",
        "|---|---|---|",
        *(
            f"| {component} | {found['precision'][component]} | {max(errors.values()):.1e} |"
            for component, errors in found["parity"]["max_relative_error"].items()
        ),
        "",
        "Whole image with a concept against diffusers' pipeline: "
        f"{found['parity']['image_psnr_db']:.1f} dB PSNR (8-bit rounding alone: 59 dB).",
    ]
    for component, reason in found["parity"]["float32_islands"].items():
        lines += ["", f"{component} is float32: {reason}."]
    if image is not None:
        lines += [
            "",
            f"An image of 256 x 256 pixels with 4 guided steps then took {image:.0f} s from the "
            "bundle, in ONNX Runtime on the CPU.",
        ]
    return "\n".join([*lines, ""])
