"""`python -m tests.soak`: attack a server for some minutes; exit code 0 if it held."""

import argparse
import asyncio
import dataclasses
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.soak.campaign import Campaign
from tests.soak.field import Field
from tests.soak.ledger import Ledger
from tests.soak.process import ROOT, Place, ServerProcess

BUNDLE = ROOT / "build" / "test" / "emoji"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    bundle: Path = arguments.bundle or _built_bundle()
    with tempfile.TemporaryDirectory(prefix="oneword-soak-") as folder:
        report = soak(bundle, arguments.keep or Path(folder), arguments.minutes, arguments.seed)
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    print(_summary(report))
    return 1 if report["violations"] else 0


def soak(bundle: Path, folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Run a server in a folder and attack it; what was seen, as JSON has it."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    server = ServerProcess(Place.make(folder, bundle), began=began)
    ledger = Ledger()
    try:
        campaign = Campaign(Field.make(server, ledger, seed), minutes)
        asyncio.run(campaign.run())
        if server.alive and (code := server.stop(signal.SIGTERM)):
            ledger.violation(f"the server ended with {code} after SIGTERM, wanted 0")
        campaign.look_at_log()
    finally:
        server.close()
    latencies = sorted(ledger.latencies_s) or [0.0]
    return {
        "minutes": minutes,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "rounds": campaign.rounds,
        "attacks": dict(sorted(campaign.dealt.items())),
        "answers": {f"{who} {code}": n for (who, code), n in sorted(ledger.counts.items())},
        "resident_call_ms": {
            "median": round(1e3 * statistics.median(latencies), 1),
            "p99": round(1e3 * latencies[int(0.99 * (len(latencies) - 1))], 1),
        },
        "readings": [dataclasses.asdict(reading) for reading in campaign.readings],
        "violations": ledger.violations,
    }


def _summary(report: dict[str, Any]) -> str:
    lines = [
        f"{report['rounds']} rounds in {report['seconds']} s, seed {report['seed']}: "
        f"{sum(report['attacks'].values())} attacks of {len(report['attacks'])} kinds",
        "answers: " + ", ".join(f"{what} {n}" for what, n in report["answers"].items()),
        f"calls of residents: median {report['resident_call_ms']['median']} ms, "
        f"p99 {report['resident_call_ms']['p99']} ms",
    ]
    violations = report["violations"]
    lines += [f"VIOLATION {text}" for text in violations]
    lines.append(f"failed: {len(violations)} violations" if violations else "held")
    return "\n".join(lines)


def _built_bundle() -> Path:
    """The embedded model's bundle, as the tests build it."""
    from tests.conftest import EMOJI_MODEL
    from trainer.export import build_bundle

    build_bundle(str(EMOJI_MODEL), BUNDLE, precision="fp32")
    return BUNDLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of attacks (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="of who attacks when (default 1)")
    parser.add_argument("--report", type=Path, help="write what was seen as JSON")
    parser.add_argument("--bundle", type=Path, help="folder (default: the embedded model's, built)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave log and stores there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
