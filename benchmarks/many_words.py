"""Many words at once: images per second with 1, 10, 100 and 1,000 different words in flight.

    python -m benchmarks.many_words [--images N] [--rounds N] [--output FILE]

Each level is the same work: as many requests, queued at once, each with a prompt of its own, which
is encoded; what differs is how many words they speak of. Words come from a store of 1,000. The
levels take turns and the best round of each is kept: other users of a machine only ever take away.
diffusers draws the same with the
words loaded beforehand, and with the words of a batch loaded when their batch comes and unloaded
after it, as a server of many users must; its table grows with each.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.memory import resident_mb
from benchmarks.peers import BUNDLE, MODEL, ROOT, Diffusers, OneWord, example_concept
from benchmarks.run import machine
from engine.batching.batcher import Batcher, Event, Failed, Finished
from engine.batching.config import BatcherConfig
from engine.concepts import Concept, write_concept
from engine.files import write_atomically
from engine.requests import GenerationRequest
from engine.store.concept_store import ConceptStore
from trainer.quiet import quiet_libraries

LEVELS = (1, 10, 100, 1000)
STEPS, GUIDANCE_SCALE = 4, 4.0
BATCH = 8  # images that advance together, in both systems
PEER_IMAGES = 160


def measure(*, images: int, rounds: int) -> dict[str, Any]:
    oneword = OneWord()
    dim = oneword.pipeline.bundle.manifest.text.dim
    words = [_word(dim, index) for index in range(max(LEVELS))]
    store = ConceptStore.temporary()
    for word in words:
        store.import_concept(word)
    config = BatcherConfig(
        max_images_in_flight=BATCH, max_queued_images=images + 1, max_queued_ms=10**9,
        max_tenant_share=1.0,
    )  # fmt: skip
    oneword.close()
    rates: dict[int, list[float]] = {level: [] for level in LEVELS}
    reads: dict[int, list[float]] = {level: [] for level in LEVELS}
    memory: dict[int, float] = {}
    warm = Batcher(oneword.pipeline, config)
    _draw_all(oneword, warm, store, 1, 2 * BATCH, "warm")
    warm.close()
    for turn in range(rounds):
        for level in LEVELS if turn % 2 else reversed(LEVELS):
            batcher = Batcher(oneword.pipeline, config)
            rate, read_ms = _draw_all(oneword, batcher, store, level, images, f"{turn}.{level}")
            batcher.close()
            rates[level].append(rate)
            reads[level].append(read_ms)
            memory[level] = resident_mb()
            print(f"{level} words: {rate:.2f} images/s", flush=True)
    store.close()
    levels = {
        str(level): {
            "images_per_s": max(rates[level]),
            "all_images_per_s": rates[level],
            "look_up_and_plan_ms": min(reads[level]),
            "resident_mb": memory[level],
        }
        for level in LEVELS
    }
    return {
        "images": images,
        "rounds": rounds,
        "levels": levels,
        "diffusers": _measure_diffusers(words, rounds),
    }


def _word(dim: int, index: int) -> Concept:
    word = example_concept(dim, seed=index)
    return Concept(placeholder_token=f"<w{index}>", learned_embeddings=word.learned_embeddings)


def _draw_all(
    oneword: OneWord, batcher: Batcher, store: ConceptStore, level: int, images: int, salt: str
) -> tuple[float, float]:
    """Images per second from the first look-up to the last image; ms of looking up and planning."""
    finished, failed = threading.Semaphore(0), list[Exception]()

    def listen(event: Event) -> None:
        if isinstance(event, Failed):
            failed.append(event.error)
        if isinstance(event, Finished | Failed):
            finished.release()

    started, planning = time.perf_counter(), 0.0
    for index in range(images):
        began = time.perf_counter()
        token = f"<w{index % level}>"
        plan = oneword.pipeline.plan(
            GenerationRequest(
                prompt=f"a photo of {token}, number {index} {salt}",
                concepts=(store.find_by_token(token),),
                seed=index,
                sampler="ddim",
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
            )
        )
        planning += time.perf_counter() - began
        batcher.submit(plan, listen)
    for _ in range(images):
        finished.acquire()
    if failed:
        raise failed[0]
    return images / (time.perf_counter() - started), 1e3 * planning / images


def _measure_diffusers(words: Sequence[Concept], rounds: int) -> dict[str, Any]:
    """Images per second in batches of 8: words loaded beforehand, and loaded for each batch."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        peer = Diffusers(folder)
        files = [folder / f"{index}.safetensors" for index in range(PEER_IMAGES)]
        for word, file in zip(words, files, strict=False):
            write_concept(word, file, "diffusers")
        loads: list[float] = []
        rates: dict[str, list[float]] = {"loaded_before": [], "loaded_for_each_batch": []}
        for _ in range(rounds):
            rates["loaded_before"].append(_draw_peer(peer, ["<x>"] * PEER_IMAGES, None, loads))
            tokens = [word.placeholder_token for word in words[:PEER_IMAGES]]
            rates["loaded_for_each_batch"].append(_draw_peer(peer, tokens, files, loads))
    return {
        **{f"{name}_images_per_s": max(values) for name, values in rates.items()},
        "load_and_unload_ms": median(loads),
        "table_rows": int(peer.pipe.text_encoder.get_input_embeddings().weight.shape[0]),
    }


def _draw_peer(
    peer: Diffusers, tokens: Sequence[str], files: Sequence[Path] | None, loads: list[float]
) -> float:
    import torch

    started = time.perf_counter()
    for first in range(0, len(tokens), BATCH):
        batch = range(first, first + BATCH)
        began = time.perf_counter()
        for index in batch if files else ():
            peer.pipe.load_textual_inversion(str(files[index]))  # pyright: ignore
        loading = time.perf_counter() - began
        peer.pipe(
            [f"a photo of {tokens[index]}, number {index}" for index in batch],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(index) for index in batch],
            output_type="np",
        )
        if files:
            began = time.perf_counter()
            peer.pipe.unload_textual_inversion([tokens[index] for index in batch])
            loads.append(1e3 * (loading + time.perf_counter() - began) / BATCH)
    return len(tokens) / (time.perf_counter() - started)


def report(results: dict[str, Any]) -> str:
    """The results as a page; every figure in it comes from `results`."""
    info, levels, peer = results["machine"], results["levels"], results["diffusers"]
    one = levels[str(LEVELS[0])]["images_per_s"]
    before, each = peer["loaded_before_images_per_s"], peer["loaded_for_each_batch_images_per_s"]
    return "\n".join(
        [
            "# Many words at once",
            "",
            f"`python -m benchmarks.many_words`, {info['date']}, {info['processor']}, "
            f"{info['cores']} cores, {info['memory_gb']} GB. The embedded model, 64 x 64, "
            f"{STEPS} steps with guidance, float32. {results['images']:,} requests queued at once, "
            f"{BATCH} images advance together; each prompt is another one and is encoded; words "
            f"come from a store of {max(LEVELS):,}. The best of {results['rounds']} rounds in "
            "turn.",
            "",
            "| different words in flight | images/s | of one word's | look up and plan, ms "
            "| resident, MB |",
            "|---|---|---|---|---|",
            *(
                f"| {int(level):,} | {row['images_per_s']:.2f} | {row['images_per_s'] / one:.3f} "
                f"| {row['look_up_and_plan_ms']:.2f} | {row['resident_mb']:.0f} |"
                for level, row in levels.items()
            ),
            "",
            f"diffusers in batches of {BATCH}, eager, on the same machine:",
            "",
            "| | images/s | OneWord with 1,000 words draws |",
            "|---|---|---|",
            *(
                f"| {name} | {rate:.2f} | {levels[str(max(LEVELS))]['images_per_s'] / rate:.2f} "
                "times as many |"
                for name, rate in (
                    ("one word, loaded beforehand", before),
                    ("each image another word, loaded for its batch and unloaded", each),
                )
            ),
            "",
            f"To load and unload a word takes diffusers {peer['load_and_unload_ms']:.1f} ms here, "
            f"with a table of {peer['table_rows']:,} rows; it copies the table, which has 49,408 "
            "rows and more columns in Stable Diffusion.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_words",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=1000, help="of each level (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of each level (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks" / "many-words.json",
        help="JSON; the page is beside it",
    )  # fmt: skip
    arguments = parser.parse_args()
    from trainer.export import build_bundle

    quiet_libraries()
    build_bundle(str(MODEL), BUNDLE, precision="fp32")
    results = measure(images=arguments.images, rounds=arguments.rounds)
    results["machine"] = machine()
    content = json.dumps(results, indent=1) + "\n"
    write_atomically(arguments.output, content.encode())
    write_atomically(arguments.output.with_suffix(".md"), report(results).encode())
    print(report(results))


if __name__ == "__main__":
    main()
