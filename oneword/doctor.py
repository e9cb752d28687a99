"""`oneword doctor`: what of this machine works, what does not and why, and what would mend it."""

import argparse
import dataclasses
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from engine.backends.cuda_device import Gpu
from engine.errors import OneWordError
from engine.files import write_atomically
from engine.plans.targets import Target
from engine.plans.tensorrt_module import Kind, import_tensorrt
from engine.printing import printable
from oneword import doctor_checks
from oneword.doctor_checks import BROKEN, MISSING, OK, Finding
from oneword.doctor_draw import draw_apart

EXIT_SOUND, EXIT_BROKEN = 0, 1
FORMAT_VERSION = 1
EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "emoji"
_SIGNS = {OK: "ok     ", MISSING: "missing", BROKEN: "BROKEN "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run every backend that this machine has on a real call, and say what works, what does "
        "not and why. Exit code 0: nothing is broken; what is merely missing is named. The report "
        "has no prompts, no paths, no user or host names, and nothing of the environment but "
        "versions of packages."
    )
    parser.add_argument(
        "bundle",
        type=Path,
        nargs="?",
        metavar="BUNDLE",
        help="draw with this one (default: one of the embedded model, built for the purpose)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Print each finding as it is made, then how many there are of each kind."""
    findings: list[Finding] = []
    for finding in examine(arguments.bundle):
        findings.append(finding)
        for line in lines_of(finding):
            print(line, flush=True)
    counts = {state: sum(f.state == state for f in findings) for state in (OK, MISSING, BROKEN)}
    print(f"\n{counts[OK]} ok, {counts[MISSING]} missing, {counts[BROKEN]} broken")
    if arguments.output is not None:
        write_atomically(arguments.output, report(findings).encode())
        print(f"report: {printable(arguments.output)}")
    return EXIT_BROKEN if counts[BROKEN] else EXIT_SOUND


def lines_of(finding: Finding) -> list[str]:
    """A finding as text."""
    lines = [f"{_SIGNS[finding.state]}  {finding.name}: {printable(finding.says)}"]
    return lines + ([f"         remedy: {finding.remedy}"] if finding.remedy else [])


def report(findings: list[Finding]) -> str:
    """The findings as JSON, to be sent."""
    fields = {
        "format_version": FORMAT_VERSION,
        "oneword": importlib.metadata.version("oneword"),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def examine(bundle: Path | None) -> Iterator[Finding]:
    """All checks, the quick ones first."""
    yield doctor_checks.machine()
    yield doctor_checks.packages()
    yield doctor_checks.driver()
    found, gpu = doctor_checks.gpu()
    yield found
    yield from doctor_checks.compilers()
    with ExitStack() as stack:
        if bundle is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found, bundle = _embedded(folder, plan_targets(gpu))
            yield found
        if bundle is None:
            return
        found, opened = doctor_checks.bundle(bundle)
        yield found
        if opened is None:
            return
        yield from doctor_checks.plans(opened, gpu)
        yield from doctor_checks.backends(bundle, draw_apart)


def plan_targets(gpu: Gpu | None) -> list[str]:
    """What the embedded model is compiled for, so that plans are run too: the GPU that is here."""
    targets: list[str] = []
    kinds: tuple[Kind, ...] = ("rtx", "trt")
    if gpu is None:
        return targets
    for kind in kinds:
        with suppress(OneWordError):  # the compilers were tried before, and said why
            import_tensorrt(kind)
            targets.append(str(Target.parse(f"{kind}:{gpu.capability}")))
    return targets


def _embedded(folder: Path, targets: list[str]) -> tuple[Finding, Path | None]:
    """A bundle of the embedded model with one sampler, where it can be built."""
    name, remedy = "embedded model", "name a bundle: oneword doctor BUNDLE"
    if not EMBEDDED_MODEL.is_dir():
        says = "this installation has no embedded model, so no backend was tried"
        return Finding(name=name, state=MISSING, says=says, remedy=remedy), None
    try:
        from trainer.quiet import quiet_libraries

        quiet_libraries()  # before what is imported next can say anything
        from trainer.export import build_bundle
    except ImportError as error:
        says = f"no bundle can be built without {error.name}, so no backend was tried"
        return Finding(name=name, state=MISSING, says=says, remedy=remedy), None
    try:
        built = build_bundle(
            EMBEDDED_MODEL, folder / "bundle", samplers=["ddim"], max_steps=8, targets=targets
        )
    except (OneWordError, OSError) as error:
        says = f"it cannot be built: {doctor_checks.one_line(error, folder)}"
        return Finding(name=name, state=BROKEN, says=says, remedy=remedy), None
    seconds = sum(built.seconds.values())
    says = f"exported and held against PyTorch in {seconds:.1f} s"
    facts = {"seconds": round(seconds, 3)}
    return Finding(name=name, state=OK, says=says, facts=facts), built.path
