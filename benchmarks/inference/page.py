"""The results as a page; every figure in it comes from the results."""

from typing import Any

from benchmarks.inference.cases import CASES
from benchmarks.serving.results import Results

EAGER = "diffusers eager"
QUALITY = "quality of int8"  # a part of the results


def page(results: Results, figure: str) -> str:
    """Markdown with a table for each case."""
    entries = list(results.values())
    if not entries:
        return "# One image on a CPU\n\nNothing was measured yet.\n"
    machine = max(entries, key=lambda entry: entry["date"])["machine"]
    lines = [
        "# One image on a CPU",
        "",
        f"`python -m benchmarks.inference`, {machine['date']}, {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory_gb']} GB. Same weights, prompt, seed, DDIM "
        "with guidance: the answers of all float32 systems agree (checked: a call to 1e-3 of its "
        "range, the image to 40 dB). Each system runs in a process of its own, in turn with "
        "OneWord float32, which is measured anew beside each: **the ratio is the figure to "
        "compare**, the median over rounds of the system's time over OneWord's, above 1 where "
        "OneWord is faster. Milliseconds of different rows were taken at different minutes of a "
        "machine that is not always equally fast. Each turn begins after a pause of 50 ms.",
        "",
        f"![Time of an image, as a multiple of OneWord's in float32]({figure})",
        "",
    ]
    for name in CASES:
        rows = case_results(results, name)
        if rows:
            lines += _case(name, rows)
    if QUALITY in results:
        lines += _quality(results[QUALITY]["result"])
    return "\n".join(lines).rstrip() + "\n"


def case_results(results: Results, case: str) -> dict[str, dict[str, Any]]:
    """System -> result, of one case."""
    prefix = f"{case}/"
    return {
        part.removeprefix(prefix): entry["result"]
        for part, entry in results.items()
        if part.startswith(prefix)
    }


def _case(name: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    case, measured = CASES[name], {n: r for n, r in rows.items() if "missing" not in r}
    eager = measured.get(EAGER)
    gflop = next(iter(rows.values()))["gflop"]
    lines = [
        f"## {case.title}",
        "",
        f"A call is two rows, {gflop:,.1f} GFLOP. Peak: the best float32 matrix product of 2048 x "
        "2048 that NumPy and ONNX Runtime did in the same run.",
        "",
        "| system | inside | call, ms | OneWord beside it, ms | ratio | share of peak "
        "| image, ms | OneWord beside it, ms | ratio (quartiles) | against eager "
        "| PSNR to float32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    if measured:
        lines.append(_own_row(measured, eager, gflop))
    lines += [_row(system, result, eager, gflop) for system, result in measured.items()]
    lines.append("")
    for system, result in rows.items():
        if "missing" in result:
            lines.append(f"- {system}: not measured: {result['missing']}")
    lines += [
        "",
        f"{case.call_rounds} rounds of a call, {case.image_rounds} of an image. Versions: "
        + "; ".join(f"{system}: {_versions(result)}" for system, result in measured.items())
        + ".",
        "",
    ]
    return lines


def _quality(result: dict[str, Any]) -> list[str]:
    psnr, marks = result["psnr_db"], result["marks"]
    return [
        "## What int8 costs",
        "",
        f"{result['prompts']} prompts of the embedded model (each of its objects on a plain "
        "background; DDIM, 20 steps, guidance 4), drawn by both bundles from the same seeds. PSNR "
        f"of int8 to float32: median {psnr['median']:.1f} dB, a tenth below {psnr['tenth']:.1f} "
        f"dB, lowest {psnr['lowest']:.1f} dB. Mean likeness of the pairs in the evaluator's eyes "
        f"(cosine): {result['likeness']:.4f}.",
        "",
        "| the evaluator's first choice is right | float32 | int8 |",
        "|---|---|---|",
        *(f"| {name} | {marks['fp32'][name]} | {marks['int8'][name]} |" for name in marks["fp32"]),
        "",
    ]


def _own_row(
    measured: dict[str, dict[str, Any]], eager: dict[str, Any] | None, gflop: float
) -> str:
    """OneWord's own, from the run beside eager where there is one."""
    beside = eager or next(iter(measured.values()))
    call, image = beside["call"]["ours_ms"], beside["image"]["ours_ms"]
    faster = f"{eager['image']['ratio']:.2f}x" if eager else ""
    share = _share(gflop, call, beside["peak_gflops"])
    return (
        f"| **OneWord** | float32 | {_ms(call)} | | 1 | {share} | {_ms(image)} | | 1 | {faster} | |"
    )


def _row(system: str, result: dict[str, Any], eager: dict[str, Any] | None, gflop: float) -> str:
    call, image = result["call"], result["image"]
    low, high = image["ratio_quartiles"]
    faster = f"{eager['image']['ratio'] / image['ratio']:.2f}x" if eager else ""
    return (
        f"| {system} | {result['precision']} | {_ms(call['ms'])} | {_ms(call['ours_ms'])} "
        f"| {call['ratio']:.2f} | {_share(gflop, call['ms'], result['peak_gflops'])} "
        f"| {_ms(image['ms'])} | {_ms(image['ours_ms'])} "
        f"| {image['ratio']:.2f} ({low:.2f} to {high:.2f}) | {faster} "
        f"| {result['psnr_db']:.1f} dB |"
    )


def _share(gflop: float, ms: float, peaks: list[float]) -> str:
    return f"{100 * gflop / (ms / 1e3) / max(peaks):.0f} %"


def _ms(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items())
