"""The results as a page; every figure in it comes from them."""

import math
from collections.abc import Callable
from typing import Any

from benchmarks.serving.cancel import OTHERS as CANCEL_OTHERS
from benchmarks.serving.load_bench import OURS, SYSTEMS
from benchmarks.serving.mix import (
    DEADLINE_S,
    DEADLINE_STRETCH,
    GUIDANCE_SCALES,
    PROMPTS,
    SAMPLERS,
    SIDES,
    STEPS,
)
from benchmarks.serving.open_loop import WARM_UP_SHARE
from benchmarks.serving.results import Results

SHED_GOAL_MS, PUBLISH_GOAL_MS = 5.0, 1000.0
_SHARED_STORES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}

Result = dict[str, Any]


def page(results: Results, figure: str) -> str:
    """`figure` is the path of the image, relative to the page."""
    sections: dict[str, Callable[[Result], list[str]]] = {
        "overhead": _overhead,
        "latency": lambda result: _latency(result, figure),
        "load": _load,
        "cancel": _cancel,
        "shed": _shed,
        "publish": _publish,
        "heap": _heap,
    }
    lines = ["# What the server costs and promises under load", "", *_about(results)]
    for part, section in sections.items():
        if part in results:
            lines += ["", *section(results[part]["result"])]
    return "\n".join(lines) + "\n"


def _about(results: Results) -> list[str]:
    info = next(iter(results.values()))["machine"]
    lines = [
        f"`make bench-serving`, {info['processor']}, {info['cores']} cores, "
        f"{info['memory_gb']} GB; onnxruntime {info['versions']['onnxruntime']}, "
        f"numpy {info['versions']['numpy']}. The embedded model in float32 on the CPU. Callers "
        "and servers share the cores.",
        "",
        "How to read it: each part says what was counted and against which goal, and whether the "
        "goal is met. p50 is the median, p99 what one of a hundred passes; with fewer than 200 "
        "values p99 is little more than the largest. Times of other machines differ, their ratios "
        "less so. `python -m benchmarks.serving --parts NAMES --again` measures parts anew; what "
        "was measured with this code on this machine is kept otherwise.",
        "",
        "| part | commit | measured | seconds |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {part} | {one['commit']} | {one['date'][:16]} | {one['seconds']:.0f} |"
        for part, one in results.items()
    ]
    return lines


def _overhead(result: Result) -> list[str]:
    lines = [
        "## The server beside the pipeline in process",
        "",
        f"One image of {result['num_inference_steps']} steps with guidance, as a PNG file, "
        f"{result['rounds']} times each way, with {result['instances']} instances of each process; "
        "the ways take turns in random order. More is the "
        "median over rounds of the difference to the pipeline in the same round. Goal for the "
        f"server: at most {result['goal_ms']:.1f} ms (1 % or 5 ms, whichever is more).",
        "",
        "| way | median ms | p10 to p90 | more, ms | p10 to p90 | goal |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in result["ways"].items():
        image, more = one["image_ms"], one["overhead_ms"]
        goal = _met(more["median"] <= result["goal_ms"]) if name.startswith("server") else ""
        lines.append(
            f"| {name} | {image['median']:.1f} | {image['p10']:.1f} to {image['p90']:.1f} "
            f"| {more['median']:+.1f} | {more['p10']:+.1f} to {more['p90']:+.1f} | {goal} |"
        )
    return lines


def _latency(result: Result, figure: str) -> list[str]:
    costs = result["step_ms_by_rows"]
    return [
        "## Batching at the step, in static batches, one at a time: latency",
        "",
        "Requests at random (Poisson) times, open loop: they come whatever is still under way, "
        f"and latency counts from when one was due. {_points(result)} The callers wait for ever: "
        "all of them have their image from all systems, so that nobody is the quicker for what it "
        "has refused.",
        "",
        f"The mix: {_shares(STEPS)} steps; guidance {_shares(GUIDANCE_SCALES)}; "
        f"{_shares(SIDES)} pixels square; {', '.join(SAMPLERS)} alike; {len(PROMPTS)} prompts, "
        "four of them with a concept each. All three systems are driven in this process over the "
        "same pipeline, without gRPC, with the same requests, times and limits. Static batches "
        f"take requests of equal size and steps and wait {result['window_ms']:g} ms for others, "
        f"the best of {', '.join(result['windows'])} ms at load 0.8. A denoiser call of 1, 2, 4, 8 "
        f"and 16 rows takes {', '.join(f'{ms:.1f}' for ms in costs.values())} ms here: nearly "
        "linear, so batches save little, whoever makes them; where calls cost the same however "
        "full they are, as on a GPU, all of this is different and is not measured here: by a "
        "clock that stands still between calls, step-level batching is then ahead of both in the "
        "median, p99 and images in time at every load (`tests/test_serving_benchmark.py`).",
        "",
        f"![latency and goodput against load]({figure})",
        "",
        "| load | system | images | images/s | p50 ms | p90 ms | p99 ms | p99 of the runs "
        "| slowdown p50 | p99 | step-level's p50 in this | p90 | p99 (95 %) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            _latency_row(load, name, points[name])
            for load, points in result["loads"].items()
            for name in SYSTEMS
        ),
        "",
        *_behind(
            result,
            {
                "images per second": lambda point: point["images_per_s"],
                "p50": lambda point: -point["latency_ms"]["median"],
                "p90": lambda point: -point["latency_ms"]["p90"],
                "p99": lambda point: -point["latency_ms"]["p99"],
                "slowdown p50": lambda point: -point["slowdown"]["median"],
                "slowdown p99": lambda point: -point["slowdown"]["p99"],
            },
        ),
        "- Slowdown is latency in the request's own time, that with nobody else there. Up to the "
        "capacity all make what comes, and images per second differ by what is still under way at "
        "the last arrival. p99 is that of few images, the longest: its ratio is given with the "
        "interval that holds it in 95 of 100 such measurements (bootstrap of blocks of requests, "
        "the same for both). Beyond the capacity the queue grows for as long as the load lasts.",
    ]


def _latency_row(load: str, name: str, point: Result) -> str:
    latency, slowdown, ratios = point["latency_ms"], point["slowdown"], point["ours_in_this"]
    runs = ", ".join(f"{p99:.0f}" for p99 in point["p99_ms_of_runs"])
    beside = " | | "
    if name != OURS:
        p99 = ratios["p99"]
        beside = (
            f"{ratios['p50']['ratio']:.2f} | {ratios['p90']['ratio']:.2f} "
            f"| {p99['ratio']:.2f} ({p99['low']:.2f} to {p99['high']:.2f})"
        )
    return (
        f"| {load} | {name} | {point['requests']} | {point['images_per_s']:.2f} "
        f"| {latency['median']:.0f} | {latency['p90']:.0f} | {latency['p99']:.0f} | {runs} "
        f"| {slowdown['median']:.1f} | {slowdown['p99']:.1f} | {beside} |"
    )


def _points(result: Result) -> str:
    runs = ", ".join(f"{number} at {load}" for load, number in result["runs"].items())
    return (
        f"{result['requests_of_a_run']} requests a run, the first {WARM_UP_SHARE:.0%} of which are "
        f"not counted; runs of each system: {runs}, in rounds over all loads and by turns in "
        f"opposite orders of the systems. Load 1 is "
        f"{result['capacity_per_s']:.2f} images/s, what the mix makes one at a time in a closed "
        f"loop ({result['capacity_afterwards_per_s']:.2f} when measured again afterwards)."
    )


def _load(result: Result) -> list[str]:
    return [
        "## The same with deadlines: images in time",
        "",
        f"The mix of above, and callers that wait for {DEADLINE_S:g} s and {DEADLINE_STRETCH:g} "
        f"times the request's own time, {result['mean_deadline_s']:.1f} s on average. Goodput "
        f"counts the images that came before that. {_points(result)} All refuse at once what "
        "cannot meet its deadline and drop what has missed it, which servers with static batches "
        f"seldom do; these wait {result['window_ms']:g} ms for others, their best. p90 and p99 of "
        "all: what so many of all requests have their image after; one that is refused or given "
        "up never has it.",
        "",
        "| load | system | images/s | goodput/s | in time | refused | given up | p50 ms | p99 ms "
        "| p90 of all | p99 of all | slowdown p50 | p99 | images |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            _load_row(load, name, points[name])
            for load, points in result["loads"].items()
            for name in SYSTEMS
        ),
        "",
        *_claims(result),
    ]


def _load_row(load: str, name: str, point: Result) -> str:
    latency, slowdown, of_all = point["latency_ms"], point["slowdown"], point["of_all_ms"]
    times = "none | none | never | never | none | none"
    if latency["count"]:
        times = f"{latency['median']:.0f} | {latency['p99']:.0f}"
        for value in (of_all["p90"], of_all["p99"]):
            times += " | never" if value is None else f" | {value:.0f}"
        times += f" | {slowdown['median']:.1f} | {slowdown['p99']:.1f}"
    return (
        f"| {load} | {name} | {point['images_per_s']:.2f} | {point['goodput_per_s']:.2f} "
        f"| {point['in_time_share']:.1%} | {point['refused_share']:.1%} "
        f"| {point['given_up_share']:.1%} | {times} | {latency['count']} of {point['requests']} |"
    )


def _or_never(ms: float | None) -> float:
    return math.inf if ms is None else ms


def _behind(result: Result, measures: dict[str, Callable[[Result], float]]) -> list[str]:
    """Where step-level batching is behind the others, by however little; of a measure more is
    better."""
    lines = list[str]()
    for title, measure in measures.items():
        behind = [
            f"{name} at {load}"
            for load, points in result["loads"].items()
            for name in SYSTEMS
            if name != OURS and measure(points[name]) > measure(points[OURS])
        ]
        lines.append(f"- {title}: {OURS} is behind {', '.join(behind) or 'neither, at any load'}.")
    return lines


def _claims(result: Result) -> list[str]:
    at_capacity, beyond = (result["loads"][load][OURS]["goodput_per_s"] for load in ("1", "1.2"))
    return [
        *_behind(
            result,
            {
                "goodput": lambda point: point["goodput_per_s"],
                "p50": lambda point: -point["latency_ms"].get("median", 0.0),
                "p99": lambda point: -point["latency_ms"].get("p99", 0.0),
                "p90 of all": lambda point: -_or_never(point["of_all_ms"]["p90"]),
                "p99 of all": lambda point: -_or_never(point["of_all_ms"]["p99"]),
                "slowdown p50": lambda point: -point["slowdown"].get("median", 0.0),
                "slowdown p99": lambda point: -point["slowdown"].get("p99", 0.0),
            },
        ),
        f"- Goodput of {OURS}: {at_capacity:.2f}/s at load 1, {beyond:.2f}/s at load 1.2.",
        "- p50, p99 and slowdown are of finished images: who refuses what would have come late has "
        "the shorter ones left. Read them with those of all, and with the latency of callers who "
        "wait for ever. Where the work ahead endangers deadlines, the earliest goes first, and the "
        f"longest images have the latest (here {DEADLINE_STRETCH:g} times their own time): they "
        "wait for the others then. Differences of a few percent are noise.",
    ]


def _cancel(result: Result) -> list[str]:
    lines = [
        "## From a cancel to a free slot",
        "",
        f"Requests of {result['steps']} steps, cancelled through gRPC at a random moment while "
        "they run. Time from the caller's cancel until the batcher has heard of it, and until it "
        "has let go of the image; denoiser calls, whoever's, that were under way when it heard or "
        "begun after that, and those since the caller's cancel; and calls with the cancelled image "
        "that were begun after it heard. Goal: at most one step from there: what travels is not "
        "heard yet.",
        "",
        "| | requests | heard, ms, p50 | p99 | free, ms, p50 | p99 | most | a step, ms "
        "| calls, p50 | calls, most | since the cancel, p50 | most | begun with it, most | goal |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = {"alone": "alone", "beside_others": f"beside {CANCEL_OTHERS} others"}
    for key, name in names.items():
        one = result[key]
        heard, free, calls = one["heard_ms"], one["slot_free_ms"], one["calls_until_free"]
        since = one["calls_since_cancel"]
        lines.append(
            f"| {name} | {one['cancelled']} | {heard['median']:.1f} | {heard['p99']:.1f} "
            f"| {free['median']:.1f} | {free['p99']:.1f} "
            f"| {free['max']:.1f} | {one['median_step_ms']:.1f} | {calls['median']:.0f} "
            f"| {calls['max']:.0f} | {since['median']:.0f} | {since['max']:.0f} "
            f"| {one['calls_begun_with_it_afterwards']['max']:.0f} "
            f"| {_met(calls['max'] <= 1)} |"
        )
    return lines


def _shed(result: Result) -> list[str]:
    lines = [
        "## How soon a loaded server says no",
        "",
        f"{result['in_flight']} images in flight and {result['queue']} waiting (half of them for "
        "the deadline), one refusal after the other. Round trip by the caller's clock; in the "
        "server by its access log, from a call's headers to its status. The rest is the network "
        "stack and the wait for a core, which the model's threads share. Goal for the decision, "
        f"that is, in the server: p99 under {SHED_GOAL_MS:g} ms.",
        "",
        "| | refusals | | p50 ms | p90 ms | p99 ms | most ms | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {"queue_full": "full queue", "deadline": "deadline that cannot be met"}
    for key, name in names.items():
        for place, words in (("in_server_ms", "in the server"), ("round_trip_ms", "round trip")):
            one = result[key][place]
            goal = _met(one["p99"] < SHED_GOAL_MS) if place == "in_server_ms" else ""
            lines.append(
                f"| {name} | {one['count']} | {words} | {one['median']:.2f} | {one['p90']:.2f} "
                f"| {one['p99']:.2f} | {one['max']:.2f} | {goal} |"
            )
    return lines


def _publish(result: Result) -> list[str]:
    lines = [
        "## From an import to the first use",
        "",
        "Two servers share one store. Milliseconds from the start of the import until it is "
        "answered, until a request with the concept is accepted at the same server and at the "
        "other (both are asked at once when the import is answered), and until the other has drawn "
        f"it; {result['publications']} imports of a new name and as many of other vectors under "
        "it, with idle servers and with two requests on each. Not yet known: requests that a "
        "server refused, or drew with the vectors of before, after the import was answered. Goal: "
        "p99 of acceptance under a second everywhere.",
        "",
        "| store | | | imported, p50 | accepted here, p50 | there, p50 | there, p99 | image there, "
        "p50 | not yet known | goal |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for store, title in _SHARED_STORES.items():
        if store not in result:
            lines.append(f"| {title} | not installed here | | | | | | | | |")
            continue
        for state, one in result[store].items():
            for kind in ("new", "replaced"):
                here = one[f"{kind}_accepted_same_server_ms"]
                there = one[f"{kind}_accepted_other_server_ms"]
                goal = max(here["p99"], there["p99"]) < PUBLISH_GOAL_MS
                lines.append(
                    f"| {title} | {state} | {kind} | {one[f'{kind}_imported_ms']['median']:.0f} "
                    f"| {here['median']:.0f} | {there['median']:.0f} | {there['p99']:.0f} "
                    f"| {one[f'{kind}_image_other_server_ms']['median']:.0f} "
                    f"| {one['refused_meanwhile']} | {_met(goal)} |"
                )
    return lines


def _heap(result: Result) -> list[str]:
    names = {
        "heap_bytes": "server, live heap",
        "resident_bytes": "server, resident",
        "model_resident_bytes": "model's process, resident",
    }
    lines = [
        f"## Memory over {result['requests']} requests",
        "",
        "Streamed, unary and batched requests of 1 to 4 steps with previews, inline and stored "
        "concepts; a third cancelled, a sixth broken: invalid, too large, no message at all, a "
        "deadline of milliseconds. Read when no call is under way. The live heap is what malloc "
        "has given out (Python's objects are in it, PYTHONMALLOC=malloc); resident memory counts "
        "what the allocator keeps as well. The slope is of a line through the second half of "
        f"{len(result['samples'])} samples. Goal: no slope of the live heap beyond two standard "
        "errors.",
        "",
        "| | first MB | last MB | bytes a request | standard error | goal |",
        "|---|---|---|---|---|---|",
    ]
    for key, one in result["slopes"].items():
        goal = _met(one["is_flat"] or one["bytes_per_request"] < 0) if key == "heap_bytes" else ""
        lines.append(
            f"| {names[key]} | {one['first_bytes'] / 2**20:.1f} | {one['last_bytes'] / 2**20:.1f} "
            f"| {one['bytes_per_request']:+.1f} | {one['standard_error']:.1f} | {goal} |"
        )
    ends = ", ".join(f"{name} {number}" for name, number in result["codes"].items())
    return [*lines, "", f"How they ended: {ends}."]


def _met(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def _shares(values: dict[Any, float]) -> str:
    return ", ".join(f"{value:g} ({share:.0%})" for value, share in values.items())
