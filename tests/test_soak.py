"""The soak's own judge finds what it is for; and half a minute of it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.conftest import ROOT
from tests.soak.gauges import Reading, growth
from tests.soak.judge import MIB, LogWatch, judge_readings, secrets_of
from tests.soak.ledger import Ledger

SECRET = b"xyzzy"
ACCESS = b"2026-11-23 07:00:00,000 INFO /oneword.v1.ImageJobService/GetJob %s 1.0 ms tenant=a\n"


def readings(*heaps_mib: float, descriptors: int = 20, last_descriptors: int = 20) -> list[Reading]:
    counts = [descriptors] * (len(heaps_mib) - 1) + [last_descriptors]
    return [
        Reading(
            at_s=10.0 * place,
            heap_bytes=round(heap * MIB),
            resident_bytes=100 * MIB,
            descriptors=count,
            threads=9,
            tasks=5,
            worker_pid=7,
            worker_resident_bytes=200 * MIB,
        )
        for place, (heap, count) in enumerate(zip(heaps_mib, counts, strict=True))
    ]


def test_a_leak_is_found_and_a_cache_that_fills_is_not() -> None:
    filling = [50.0, 53.0, 55.0, 56.5, 58.0, 58.5, 58.8, 59.0, *[59.1, 59.0] * 4]
    assert judge_readings(readings(*filling)) == []
    noisy = [59.0, 60.5, 58.8, 59.1, 60.9, 58.7, 60.2, 59.0] * 2
    assert judge_readings(readings(*noisy)) == []
    leaking = [50.0 + 0.2 * place for place in range(16)]
    (found,) = judge_readings(readings(*leaking))
    assert found.startswith("heap_bytes grew by 1.40 MiB over the second half")
    assert judge_readings(readings(*leaking[:4])) == [], "too few to tell it from a cache"
    assert judge_readings(readings(50.0, 54.0, 58.0, 64.0)), "but for one that large"


def test_what_grpc_loses_with_calls_that_are_given_up_is_not_ours() -> None:
    for calls, num_found in ((500, 1), (1500, 0)):  # in each round: 0.2 and 0.6 MiB in that half
        leaking = [
            dataclasses.replace(reading, given_up=calls * place)
            for place, reading in enumerate(readings(*(50.0 + 0.2 * n for n in range(16))))
        ]
        assert len(judge_readings(leaking)) == num_found


def test_a_descriptor_that_stays_open_each_round_is_found() -> None:
    (found,) = judge_readings(readings(*[50.0] * 6, last_descriptors=24))
    assert found.startswith("descriptors grew")
    assert judge_readings(readings(*[50.0] * 6, last_descriptors=23)) == []


def test_one_reading_tells_no_trend() -> None:
    assert growth([1.0], [5.0]) == (0.0, 0.0)
    assert judge_readings(readings(50.0)) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (ACCESS % b"INTERNAL", "INTERNAL"),
        (ACCESS % b"UNKNOWN", "UNKNOWN"),
        (b"  | Traceback (most recent call last):\n", "Traceback"),
        (b"Task exception was never retrieved\n", "never retrieved"),
        (b"2026 WARNING a prompt: a xyzzy cat\n", "a secret or a prompt"),
        (ACCESS % b"OK", ""),
        (ACCESS % b"INVALID_ARGUMENT", ""),
    ],
)
def test_what_a_log_may_not_hold(line: bytes, found: str) -> None:
    watch = LogWatch([SECRET])
    before = ACCESS % b"OK"
    assert watch.look(before) == []
    problems = watch.look(before + line)
    assert bool(problems) == bool(found)
    assert found in "".join(problems)
    assert watch.look(before + line) == [], "told once"


def test_the_secret_half_of_a_token_is_looked_for() -> None:
    assert secrets_of(["ow_abc_def"]) == [b"def"]


def test_words_and_images_of_others_are_found() -> None:
    ledger = Ledger()
    ledger.keep_secret("acme", "xyzzy")
    ledger.keep_picture("acme", b"picture")
    ledger.received("acme", "Generate", b"a xyzzy cat")
    ledger.received_picture("acme", "Generate", b"picture")
    assert ledger.violations == []
    ledger.received("globex", "Generate", "a xyzzy cat".encode("utf-16-be"))
    ledger.received("", "Check", b"xyzzy")
    ledger.received_picture("globex", "Generate", b"picture")
    assert len(ledger.violations) == 3


def test_a_bug_is_one_whoever_sees_it() -> None:
    ledger = Ledger()
    for code in StatusCode:
        ledger.answered("mallory", code, "Generate")
    assert [text.rpartition(" ")[2] for text in ledger.violations] == [
        "UNKNOWN",
        "INTERNAL",
        "DATA_LOSS",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_a_minute_of_the_soak(emoji_bundle_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.5", "--seed", "7"]
    command += ["--bundle", str(emoji_bundle_path), "--keep", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
