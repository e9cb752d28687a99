"""Build a bundle from a diffusers model: ONNX graphs, sampler tables, compiled plans."""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engine.bundle import MANIFEST
from engine.errors import BundleError, OneWordError
from engine.plans.manifest import PLAN_MANIFEST
from engine.plans.targets import CAPABILITIES, Target
from engine.security.bundle_signatures import check_signatures, plan_folders
from engine.security.signing import (
    Ed25519PrivateKey,
    TrustedKeys,
    key_id,
    read_private_key,
    sign_file,
)
from trainer.messages import first_line

if TYPE_CHECKING:
    from trainer.export import BuildReport


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_engines.py",
        description="Build the bundle that the runtime serves from a model of a supported family "
        "(docs/families.md). What is there already and built from the same inputs is kept.",
        epilog="example: python build_engines.py --model models/emoji --output bundles/emoji "
        "--target rtx:sm86,sm89",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="a diffusers folder, or OWNER/NAME on the Hugging Face hub",
    )
    source.add_argument(
        "--from-onnx",
        type=Path,
        metavar="DIR",
        help="a Stable Diffusion that optimum exported to ONNX (docs/bundles-from-elsewhere.md); "
        "needs no PyTorch with --samplers-from",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="BUNDLE",
        help="the folder to write; replaced only if it is a bundle, and only by a complete one",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="inside the ONNX graphs (default: %(default)s); a component that does not bear fp16 "
        "is found by the parity gate and stays fp32; int8, of the denoiser alone, is for CPUs: "
        "faster, with images that differ (docs/cpu-backend.md)",
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="rtx:SM[,SM...]",
        help="also compile fp16 plans with TensorRT for RTX, no GPU needed; SM of "
        f"{', '.join(CAPABILITIES)}; or trt:native (or trt:SM) with TensorRT for this machine's "
        "GPU; may be given several times",
    )
    parser.add_argument(
        "--bucket",
        action="append",
        default=[],
        metavar="WIDTHxHEIGHT",
        help="a size in pixels that plans are tuned for, or all from one to another: "
        "512x512-768x768; may be given several times (default: the model's own size, and half of "
        "it to 1.5 times as much)",
    )
    parser.add_argument(
        "--plan-cache",
        type=Path,
        metavar="DIR",
        help="keep compiled plans there by what they were compiled from, for all bundles",
    )
    parser.add_argument(
        "--sign-key",
        type=Path,
        metavar="FILE",
        help="sign what is built with this private key (`oneword keys create` makes one)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub model")
    parser.add_argument(
        "--samplers-from",
        type=Path,
        metavar="BUNDLE",
        help="with --from-onnx: take over the sampler tables of a bundle of the same schedule",
    )
    return parser


class Progress:
    """A bar on a terminal, a line for each finished stage elsewhere."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._start = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == 0:
            self._start = time.perf_counter()
        if sys.stderr.isatty():
            self._draw(stage, done, total)
        elif done == total:
            print(f"  {stage}: {time.perf_counter() - self._start:.1f} s", file=sys.stderr)

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bar is None:
            bar_format = "{desc}: {n_fmt}/{total_fmt} {elapsed}"
            self._bar = tqdm(desc=stage, total=total, bar_format=bar_format)
        self._bar.total = total
        self._bar.n = done
        self._bar.refresh()
        if done == total:
            self._bar.close()
            self._bar = None


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.from_onnx is not None:
        if options.target or options.revision or options.precision != "fp32":
            parser.error("--from-onnx makes float32 graphs; it takes no --target, --revision, fp16")
        return import_from_onnx(options)
    if options.samplers_from is not None:
        parser.error("--samplers-from goes with --from-onnx")
    try:
        from trainer.quiet import quiet_libraries

        quiet_libraries()  # before what is imported next can say anything
        from trainer.compile_plans import PlanOptions
        from trainer.export import build_bundle
    except ImportError as error:
        return fail(
            f"{error}; building needs PyTorch and diffusers: `pip install oneword[train,cpu]`"
        )
    # As an exception, so that the half-built bundle is cleaned away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        key = None if options.sign_key is None else read_private_key(options.sign_key)
        report = build_bundle(
            options.model,
            options.output,
            precision=options.precision,
            targets=options.target,
            plans=PlanOptions(buckets=options.bucket, cache=options.plan_cache),
            revision=options.revision,
            progress=Progress(),
        )
        if key is not None:
            sign_report(report, key)
    except (OneWordError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was published", code=130)  # as shells say of SIGINT
    print(describe(report))
    return 0


def import_from_onnx(options: argparse.Namespace) -> int:
    """The same for graphs that optimum exported; PyTorch is imported for sampler tables alone."""
    try:
        from trainer.optimum_import import import_optimum
    except ImportError as error:
        return fail(f"{error}; reading ONNX needs onnx: `pip install onnx oneword[cpu]`")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        key = None if options.sign_key is None else read_private_key(options.sign_key)
        report = import_optimum(
            options.from_onnx, options.output, samplers_from=options.samplers_from
        )
        if key is not None and report.errors:
            sign_file(report.path / MANIFEST, key, name=MANIFEST)
        if key is not None:
            check_signatures(report.path, TrustedKeys({key_id(key.public_key()): key.public_key()}))
    except (OneWordError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was published", code=130)
    print(f"{report.path}: " + ("built" if report.errors else "up to date, nothing to build"))
    for component, error in report.errors.items():
        print(f"  {component} against optimum's: {error:.1e} of its range")
    return 0


def sign_report(report: "BuildReport", key: Ed25519PrivateKey) -> None:
    """Sign what this run has built. What lay there before is not vouched for unseen."""
    made = {Target.parse(target).folder for target in report.compiled}
    if report.was_built:
        sign_file(report.path / MANIFEST, key, name=MANIFEST)
    for folder in plan_folders(report.path):
        if folder.name in made:
            sign_file(folder / PLAN_MANIFEST, key, name=PLAN_MANIFEST)
    try:
        check_signatures(report.path, TrustedKeys({key_id(key.public_key()): key.public_key()}))
    except BundleError as error:
        raise BundleError(
            f"built earlier, and so not signed now: {error}. If you trust what lies there, sign it "
            f"with `oneword keys sign {report.path}`; else build into a new folder"
        ) from error


def describe(report: "BuildReport") -> str:
    """What was built: files with sizes, times, parity."""
    lines = [f"{report.path}: " + ("built" if report.was_built else "up to date, nothing to build")]
    if report.parity is not None:
        sizes = {file: (report.path / file).stat().st_size for file in report.manifest.files}
        lines += [f"  {file:<30}{size / 1e3:>12,.0f} kB" for file, size in sizes.items()]
        lines.append(f"  image against diffusers: {report.parity.image_psnr_db:.1f} dB PSNR")
        for component, errors in report.parity.max_relative_error.items():
            lines.append(f"  {component} against PyTorch: {max(errors.values()):.1e} of its range")
        for component, reason in report.parity.float32_islands.items():
            lines.append(f"  {component} stays float32: {reason}")
    lines += [f"  compiled plans for {target}" for target in report.compiled]
    if report.seconds:
        lines.append(f"  {sum(report.seconds.values()):.1f} s in all")
    return "\n".join(lines)


def fail(error: object, *, code: int = 1) -> int:
    """One line for people and an exit code for scripts."""
    print(f"build_engines.py: {first_line(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
