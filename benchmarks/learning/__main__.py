"""What each way of learning a word is worth, beside diffusers' own script.

python -m benchmarks.learning [--settings NAMES] [--concepts NAMES] [--seeds N]

Each result is kept in docs/benchmarks/learning.json as soon as it is there, and no run is measured
twice: a benchmark that was stopped goes on, and more seeds can be added later. One process a core,
each on a single thread. `python -m benchmarks.learning.cost` measures time and memory.
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.learning import peer
from benchmarks.learning.judge import CONCEPTS
from benchmarks.learning.measure import Measured, measure
from benchmarks.learning.report import REPORT, read_results, write_results
from benchmarks.learning.settings import PEER, SETTINGS
from engine.sessions import usable_cores


def main() -> None:
    names = [*SETTINGS, PEER]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", default=";".join(names), help="names, with semicolons")
    parser.add_argument("--concepts", default=",".join(peer.INITIALIZERS), help="with commas")
    parser.add_argument("--seeds", type=int, default=3, help="0 to N - 1 (%(default)s)")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="processes (%(default)s)")
    parser.add_argument("--report", type=Path, default=REPORT, help="JSON; the page is beside it")
    arguments = parser.parse_args()
    settings, concepts = arguments.settings.split(";"), arguments.concepts.split(",")
    if unknown := [name for name in settings if name not in names]:
        parser.error(f"no setting {unknown[0]!r}; there are {'; '.join(names)}")
    if unknown := [name for name in concepts if not (CONCEPTS / name).is_dir()]:
        parser.error(f"no concept {unknown[0]!r} in {CONCEPTS}")
    if PEER in settings:
        peer.check_script()
    results = read_results(arguments.report)
    done = {one.key for one in results}
    keys = [
        (setting, concept, seed)
        for seed in range(arguments.seeds)
        for setting in settings
        for concept in concepts
        if (setting, concept, seed) not in done
    ]
    for result in _measured(keys, arguments.jobs):
        # Another process may have added to the file: it is read again each time.
        others = [one for one in read_results(arguments.report) if one.key != result.key]
        write_results(arguments.report, [*others, result])


def _measured(keys: list[tuple[str, str, int]], jobs: int) -> Iterator[Measured]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        futures = [pool.submit(measure, *key) for key in keys]
        for future in tqdm(as_completed(futures), total=len(futures), desc="words", unit="word"):
            yield future.result()


if __name__ == "__main__":
    main()
