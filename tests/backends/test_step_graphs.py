"""The sampler's step as graphs: the numbers of engine/samplers.py, slot by slot."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from engine.backends.device import DeviceArray, Program
from engine.backends.ort_program import OrtProgram
from engine.backends.step_graphs import CLEAN, HISTORY, LATENTS, STEP_UPDATE, step_graphs
from engine.backends.step_tables import SlotStep, StepTables
from engine.bundle import Manifest, read_manifest
from engine.samplers import StepCoefficients, predict_clean, step
from tests.backends.host_device import HostDevice

SLOTS, CHANNELS, HEIGHT, WIDTH, MOST = 5, 4, 6, 10, 3
DEVICE = HostDevice()


@pytest.fixture(scope="module")
def manifest(emoji_bundle_path: Path) -> Manifest:
    return read_manifest(emoji_bundle_path)


@pytest.fixture(scope="module")
def update(manifest: Manifest) -> Program:
    graph = step_graphs(manifest, MOST)[STEP_UPDATE]
    return OrtProgram(graph.model.SerializeToString(), graph.spec, num_threads=1)


def random_row(generator: np.random.Generator, history: int, c: float) -> StepCoefficients:
    numbers = dict(zip("spqaefk", generator.normal(size=7), strict=True))
    named = {name: float(numbers[name]) for name in "spqaef"}
    b = tuple(float(weight) for weight in generator.normal(size=history + 1))
    return StepCoefficients(timestep=3.0, c=c, k0=0.0, k1=0.0, b=b, **named)


def uploaded(values: np.ndarray) -> DeviceArray:
    array = DEVICE.empty(values.shape, values.dtype)
    DEVICE.upload(array, values)
    return array


def updated(
    update: Program,
    images: list[SlotStep],
    noise_pred: np.ndarray,
    state: np.ndarray,
    noise: np.ndarray,
) -> np.ndarray:
    tables = StepTables(DEVICE, rows=len(noise_pred), slots=SLOTS, history=MOST)
    tables.upload(images)
    inputs = {"noise_pred": noise_pred, "state": state, "noise": noise}
    arrays = {name: uploaded(values) for name, values in inputs.items()}
    arrays |= {name: tables.array(name) for name in ("row_index", "coefficients")}
    following = uploaded(np.zeros_like(state))
    update.bind(arrays, {"next_state": following})()
    return DEVICE.download(following)


def random_call(
    generator: np.random.Generator,
) -> tuple[list[SlotStep], np.ndarray, np.ndarray, np.ndarray]:
    """Three images with one and two rows, short and long history, with noise and without."""
    images = [
        SlotStep(slot=3, weights=(-6.5, 7.5), row=random_row(generator, 3, 0.7), noise=None),
        SlotStep(slot=0, weights=(1.0,), row=random_row(generator, 0, 0.0), noise=None),
        SlotStep(slot=4, weights=(-1.0, 2.0), row=random_row(generator, 1, 0.0), noise=None),
    ]
    shape = (CHANNELS, HEIGHT, WIDTH)
    state = generator.normal(size=(SLOTS, HISTORY + MOST, *shape)).astype(np.float32)
    noise = generator.normal(size=(SLOTS, *shape)).astype(np.float32)
    return images, generator.normal(size=(5, *shape)).astype(np.float32), state, noise


@pytest.mark.parametrize("seed", range(5))
def test_the_update_is_that_of_the_samplers(update: Program, seed: int) -> None:
    images, noise_pred, state, noise = random_call(np.random.default_rng(seed))
    found = updated(update, images, noise_pred, state, noise)
    first = 0
    for image in images:
        rows = noise_pred[first : first + len(image.weights)]
        first += len(image.weights)
        guided = np.tensordot(np.array(image.weights, np.float32), rows, axes=1)
        latents, past = state[image.slot, LATENTS], tuple(state[image.slot, HISTORY:])
        # `step` takes as much history as there is; what is beyond has no weight in the row.
        after, kept = step(latents, guided, past, noise[image.slot], image.row)
        # float32 in both, in the same order; a fused product may round once less.
        np.testing.assert_allclose(found[image.slot, LATENTS], after, rtol=1e-5, atol=1e-5)
        for place, entry in enumerate(kept):
            np.testing.assert_allclose(
                found[image.slot, HISTORY + place], entry, rtol=1e-5, atol=1e-5
            )
        clean = predict_clean(latents, guided, image.row)
        np.testing.assert_allclose(found[image.slot, CLEAN], clean, rtol=1e-5, atol=1e-5)


def test_slots_that_take_no_part_are_passed_on_bit_for_bit(update: Program) -> None:
    images, noise_pred, state, noise = random_call(np.random.default_rng(7))
    found = updated(update, images, noise_pred, state, noise)
    for slot in {*range(SLOTS)} - {image.slot for image in images}:
        np.testing.assert_array_equal(found[slot], state[slot])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_overflows_in_one_image_reaches_no_other(update: Program, value: float) -> None:
    images, noise_pred, state, noise = random_call(np.random.default_rng(8))
    sound = updated(update, images, noise_pred, state, noise)
    noise_pred[:2] = value  # the rows of the image in slot 3
    broken = updated(update, images, noise_pred, state, noise)
    assert not np.isfinite(broken[3, LATENTS]).any()
    for slot in (0, 1, 2, 4):
        np.testing.assert_array_equal(broken[slot], sound[slot])


def test_tables_name_the_slot_and_prompt_of_every_row() -> None:
    images, *_ = random_call(np.random.default_rng(9))
    tables = StepTables(DEVICE, rows=8, slots=SLOTS, history=MOST)
    tables.upload(images)
    rows = {n: DEVICE.download(tables.array(n, 5)) for n in ("row_slot", "row_prompt", "scale")}
    assert rows["row_slot"].tolist() == [3, 3, 0, 4, 4]
    assert rows["row_prompt"].tolist() == [6, 7, 0, 8, 9]
    np.testing.assert_allclose(rows["scale"][[0, 2, 3]], [image.row.s for image in images])
    index = DEVICE.download(tables.array("row_index"))
    assert index[[3, 0, 4]].tolist() == [[0, 1], [2, 2], [3, 4]]
    # Whoever was told of before is told nothing now.
    tables.upload([dataclasses.replace(images[1], slot=1)])
    assert DEVICE.download(tables.array("coefficients"))[:, 0].tolist() == [0, 1, 0, 0, 0]
