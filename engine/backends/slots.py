"""Images of one shape on a device: a fixed slot for each, and a call that advances some of them.

Two copies of the state take turns: a call reads one and writes the other, so that latents are not
copied from step to step and no graph reads what it writes. What crosses from the host at a step is
one table of numbers, and noise where a sampler asks for it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from engine.backends.device import Array, Call, Device, DeviceArray, Program, output_arrays
from engine.backends.step_graphs import (
    CLEAN,
    DECODER_INPUT,
    HISTORY,
    LATENTS,
    ROW_INPUT,
    STEP_UPDATE,
    slot_name,
)
from engine.backends.step_tables import SlotStep, StepTables
from engine.errors import ConfigError
from engine.plans.profiles import ROWS_PER_IMAGE
from engine.samplers import Latents

FIRST_CAPACITY = 8
# That are kept ready: steps may be CUDA graphs, decodes hold whole pictures.
_MAX_STEPS, _MAX_DECODES = 16, 2

T = TypeVar("T")


class Slots:
    """The slots of one shape. For one thread, but that a slot may be given back from any."""

    def __init__(
        self,
        device: Device,
        programs: Mapping[str, Program],
        *,
        latent_shape: tuple[int, int, int],
        row_shapes: Mapping[str, tuple[int, ...]],
        history: int,
        scale_factor: int,
    ) -> None:
        """`row_shapes`: what an image keeps for each of its rows, by input of the denoiser."""
        self._device = device
        self._programs = programs
        self._latent_shape = latent_shape
        self._row_shapes = dict(row_shapes)
        self._history = history
        self._scale_factor = scale_factor
        self._free: list[int] = []
        self._capacity = 0
        self._turn = 0  # of the two copies of the state, the one that counts
        self._states: list[DeviceArray] = []
        self._kept: dict[str, DeviceArray] = {}
        self._steps: dict[tuple[int, int], Call] = {}  # (rows, turn) -> one step
        self._decodes: dict[tuple[int, int], tuple[DeviceArray, Call, DeviceArray]] = {}
        self._grow(FIRST_CAPACITY)

    @property
    def in_use(self) -> int:
        """Images that have a slot."""
        return self._capacity - len(self._free)

    def take(self) -> int:
        """A free slot; where there is none, there is room for twice as many from now on.

        Raises `ConfigError` where the plans take no more.
        """
        if not self._free:
            most = self._programs[STEP_UPDATE].largest("slots")
            if most is not None and 2 * self._capacity > most:
                raise ConfigError(
                    f"more than {self._capacity} images of one size in flight, which is what the "
                    "plans take; lower max_images_in_flight"
                )
            self._grow(2 * self._capacity)
        return self._free.pop(0)

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def put(self, slot: int, latents: Latents, kept: Mapping[str, Array]) -> None:
        """Begin an image: its first latents, and what each of its rows is told at every step.

        Whatever the slot held is gone, so that nothing of it reaches this image.
        """
        state = np.zeros(self._state_shape(1)[1:], np.float32)
        state[LATENTS] = latents
        self._device.upload(self._states[self._turn].part(slot), state)
        for name, values in kept.items():
            for row, value in enumerate(values):
                place = self._kept[name].part(ROWS_PER_IMAGE * slot + row)
                self._device.upload(place, np.asarray(value, place.dtype, order="C"))

    def step(self, images: Sequence[SlotStep]) -> None:
        """Advance images by one step each, in one call of the denoiser. Does not wait for it."""
        rows = sum(len(image.weights) for image in images)
        if rows > self._row_capacity:
            self._make_room_for_rows(1 << (rows - 1).bit_length())
        self._tables.upload(images)
        for image in images:
            if image.noise is not None:
                self._device.upload(self._noise.part(image.slot), image.noise)
        _ready(self._steps, (rows, self._turn), lambda: self._make_step(rows), _MAX_STEPS)()
        self._turn = 1 - self._turn

    def decode(self, slots: Sequence[int]) -> Array:
        """Wait, and return the decoder's images `[slots, 3, height, width]`."""
        key = (len(slots), self._turn)
        chosen, call, images = _ready(
            self._decodes, key, lambda: self._make_decode(len(slots)), _MAX_DECODES
        )
        self._device.upload(chosen, np.array(slots, np.int32))
        call()
        return self._device.download(images)

    def latents(self, slot: int) -> Latents:
        """Wait, and copy the latents of an image to the host."""
        return self._device.download(self._states[self._turn].part(slot, LATENTS))

    def clean_prediction(self, slot: int) -> Latents:
        """Wait, and copy what the image was expected to become at its last step."""
        return self._device.download(self._states[self._turn].part(slot, CLEAN))

    def _make_step(self, rows: int) -> Call:
        """Bind the three graphs of a call to their arrays, and record them as one."""
        arrays = {name: array.first(rows) for name, array in self._rows.items()}
        answer = {"noise_pred": arrays.pop("noise_pred")}
        before, after = self._states[self._turn], self._states[1 - self._turn]
        by_row = {n: self._tables.array(n, rows) for n in ("scale", "row_slot", "row_prompt")}
        by_slot = {name: self._tables.array(name) for name in ("row_index", "coefficients")}
        kept = {slot_name(name): array for name, array in self._kept.items()}
        timestep = self._tables.array("timestep", rows)
        return self._device.record(
            [
                self._programs[ROW_INPUT].bind({"state": before, **by_row, **kept}, arrays),
                self._programs["denoiser"].bind({**arrays, "timestep": timestep}, answer),
                self._programs[STEP_UPDATE].bind(
                    {**answer, "state": before, "noise": self._noise, **by_slot},
                    {"next_state": after},
                ),
            ]
        )

    def _make_decode(self, count: int) -> tuple[DeviceArray, Call, DeviceArray]:
        """Where the chosen slots are told, the call that decodes them, and where images are."""
        decoder = self._programs["vae_decoder"]
        (latents,) = decoder.spec.inputs
        _, height, width = self._latent_shape
        lengths = {
            "batch": count,
            "image_height": height * self._scale_factor,
            "image_width": width * self._scale_factor,
        }
        (images,) = output_arrays(self._device, decoder.spec, lengths).values()
        chosen = self._device.empty([count], np.int32)
        told = {latents.name: self._device.empty([count, *self._latent_shape], latents.dtype)}
        state = self._states[self._turn]
        call = self._device.record(
            [
                self._programs[DECODER_INPUT].bind({"state": state, "image_slot": chosen}, told),
                decoder.bind(told, {decoder.spec.outputs[0].name: images}),
            ]
        )
        return chosen, call, images

    def _grow(self, capacity: int) -> None:
        """Make room for more images; those that are there stay where they are."""
        old_states, old_kept = self._states, self._kept
        self._states = [self._device.empty(self._state_shape(capacity), np.float32) for _ in "ab"]
        for new, old in zip(self._states, old_states, strict=False):
            self._device.copy(new.first(old.shape[0]), old)
        self._kept = {
            name: self._device.empty([ROWS_PER_IMAGE * capacity, *shape], self._dtype(name))
            for name, shape in self._row_shapes.items()
        }
        for name, old in old_kept.items():
            self._device.copy(self._kept[name].first(old.shape[0]), old)
        self._noise = self._device.empty([capacity, *self._latent_shape], np.float32)
        self._free += range(self._capacity, capacity)
        self._capacity = capacity
        self._decodes.clear()
        self._make_room_for_rows(ROWS_PER_IMAGE)

    def _make_room_for_rows(self, rows: int) -> None:
        """Memory whose size depends on the rows of a call; what was bound to the old is let go."""
        self._steps.clear()
        self._row_capacity = rows
        answer = self._programs["denoiser"].spec.outputs[0].dtype
        self._rows = {
            "latents": self._device.empty([rows, *self._latent_shape], self._dtype("latents")),
            "noise_pred": self._device.empty([rows, *self._latent_shape], answer),
            **{
                name: self._device.empty([rows, *shape], self._dtype(name))
                for name, shape in self._row_shapes.items()
            },
        }
        self._tables = StepTables(
            self._device, rows=rows, slots=self._capacity, history=self._history
        )

    def _state_shape(self, slots: int) -> tuple[int, ...]:
        return (slots, HISTORY + self._history, *self._latent_shape)

    def _dtype(self, name: str) -> str:
        (dtype,) = (t.dtype for t in self._programs["denoiser"].spec.inputs if t.name == name)
        return dtype


def _ready(
    calls: dict[tuple[int, int], T], key: tuple[int, int], make: Callable[[], T], most: int
) -> T:
    """A call that is kept, or made now; the oldest makes room for it."""
    if key not in calls:
        if len(calls) >= most:
            del calls[next(iter(calls))]
        calls[key] = make()
    return calls[key]
