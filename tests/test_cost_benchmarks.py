"""The benchmarks of many words and of cost against work: what they fit, draw and say."""

from typing import Any

import numpy as np
import pytest

from benchmarks import cost, many_words

MACHINE = {"date": "2026-01-01", "processor": "a processor", "cores": 2, "memory_gb": 24}


def test_a_fit_finds_the_law_that_made_the_times() -> None:
    law = cost.CallFit(call_s=0.02, linear_s=0.4, square_s=0.05)
    calls = [(rows, pixels) for rows in cost.ROWS for pixels in cost.PIXELS]
    found = cost.fit_calls({call: law(*call) for call in calls})
    assert (found.call_s, found.linear_s, found.square_s) == pytest.approx((0.02, 0.4, 0.05))
    assert cost.thousand_latents(512) == 4.096


def test_a_fit_weighs_a_short_call_as_much_as_a_long_one() -> None:
    law = cost.CallFit(call_s=0.02, linear_s=0.4, square_s=0.05)
    calls = [(rows, pixels) for rows in cost.ROWS for pixels in cost.PIXELS]
    noise = np.random.default_rng(0).uniform(0.98, 1.02, len(calls))
    times = {call: law(*call) * float(n) for call, n in zip(calls, noise, strict=True)}
    found = cost.fit_calls(times)
    worst = max(abs(found(*call) / law(*call) - 1) for call in calls)
    assert worst < 0.03  # errors of 2 % in each time, averaged over 25 of them


def test_a_report_of_costs_has_its_figures_and_its_picture_shows_them() -> None:
    law = cost.CallFit(call_s=0.02, linear_s=0.4, square_s=0.05)
    calls = [(rows, 256) for rows in cost.ROWS] + [(1, pixels) for pixels in cost.PIXELS[1:]]
    results: dict[str, Any] = {
        "machine": MACHINE,
        "rounds": 4,
        "calls": [
            {"rows": r, "pixels": p, "s": 1.1 * law(r, p), "fitted_s": law(r, p)} for r, p in calls
        ],
        "fit": {"call_s": 0.02, "linear_s": 0.4, "square_s": 0.05},
        "images": [{"steps": steps, "s": 2.0 + 0.5 * steps} for steps in cost.STEPS],
        "image_fit": {"start_s": 2.0, "step_s": 0.5},
    }
    text = cost.report(results, "cost.png")
    assert "The farthest call is off by 9 %." in text and "![" in text
    assert f"| 16 | 256 | {1.1 * law(16, 256):.2f} | {law(16, 256):.2f} |" in text
    assert "| 50 | 27.00 | 27.00 |" in text
    panels = cost.panels(results)
    assert [panel.x_label for panel in panels] == ["rows", "pixels of a side", "steps"]
    one = np.asarray(cost.draw_panels(panels))
    results["calls"][0]["s"] *= 3
    assert (one != np.asarray(cost.draw_panels(cost.panels(results)))).any()


def test_a_report_of_many_words_compares_with_one_word_and_with_diffusers() -> None:
    levels = {
        str(level): {"images_per_s": rate, "look_up_and_plan_ms": 0.3, "resident_mb": 400.0}
        for level, rate in zip(many_words.LEVELS, (20.0, 20.0, 19.0, 18.0), strict=True)
    }
    peer = {
        "loaded_before_images_per_s": 9.0,
        "loaded_for_each_batch_images_per_s": 6.0,
        "load_and_unload_ms": 12.5,
        "table_rows": 1500,
    }
    text = many_words.report(
        {"machine": MACHINE, "images": 1000, "rounds": 2, "levels": levels, "diffusers": peer}
    )
    assert "| 1,000 | 18.00 | 0.900 | 0.30 | 400 |" in text
    assert "| 9.00 | 2.00 times as many |" in text and "| 6.00 | 3.00 times as many |" in text
    assert "12.5 ms here, with a table of 1,500 rows" in text
