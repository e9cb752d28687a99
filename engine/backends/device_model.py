"""A model whose images stay on a device: latents come back to the host once, as a picture.

What is done once for an image (prompts, initial images, first latents) is the host's work as in
`engine.pipeline.ImageModel`; steps and decoding are enqueued on the device. A step waits for the
one before it and not for itself: the device is never idle between steps, a request that arrives is
at most one step late, and the time that a call takes is the time of a step.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.backends.device import Device, Mark, Program, shapes_of
from engine.backends.device_session import DeviceSession
from engine.backends.slots import Slots
from engine.backends.step_tables import SlotStep
from engine.bundle import Bundle
from engine.errors import InvalidRequest, NumericalError
from engine.pipeline import ImageInFlight, ImageModel, pictures_of
from engine.planner import DenoisingTask
from engine.plans.profiles import ROWS_PER_IMAGE
from engine.requests import RgbImage
from engine.samplers import NUM_COLUMNS, Latents, SamplerTable
from engine.sessions import Session

MAX_SHAPES = 4  # whose memory is kept


def history_of(tables: Mapping[str, SamplerTable]) -> int:
    """How many earlier outputs the samplers of a bundle look back at."""
    return max(table.rows.shape[1] - NUM_COLUMNS - 1 for table in tables.values())


@dataclass(slots=True, eq=False)
class DeviceImage(ImageInFlight):
    """An image in flight; `latents` are its first ones. Its slot is free again when it is gone."""

    place: tuple[Slots, int] | None = None

    @classmethod
    def of(cls, image: ImageInFlight) -> "DeviceImage":
        return cls(**{f.name: getattr(image, f.name) for f in dataclasses.fields(image)})

    def leave(self) -> None:
        """Give the slot back. Idempotent."""
        place, self.place = self.place, None
        if place is not None:
            place[0].give_back(place[1])

    def __del__(self) -> None:
        self.leave()


class DeviceImageModel(ImageModel):
    """The graphs of a bundle on a device."""

    def __init__(self, bundle: Bundle, device: Device, programs: Mapping[str, Program]) -> None:
        scale = bundle.manifest.latents.scale_factor
        sessions: dict[str, Session] = {
            name: DeviceSession(device, programs[name], scale_factor=scale)
            for name in bundle.manifest.components
        }
        super().__init__(bundle, sessions)
        self._device = device
        self._programs = dict(programs)
        self._history = history_of(bundle.sampler_tables)
        self._slots: dict[tuple[int, ...], Slots] = {}
        self._last: Mark | None = None
        self._max_rows = programs["denoiser"].largest("rows")
        self._max_decoded = programs["vae_decoder"].largest("batch")

    def begin_task(self, task: DenoisingTask) -> list[ImageInFlight]:
        """As `ImageModel.begin_task`; raises `InvalidRequest` for a size that no plan takes."""
        self._check_size(task)
        return [DeviceImage.of(image) for image in super().begin_task(task)]

    def step(self, images: Sequence[ImageInFlight], *, at_most: int = 1) -> None:
        """Advance images by one row each, in one denoiser call or as many as its rows allow."""
        for group in self._groups(_on_device(images)):
            self._step(group)
        before, self._last = self._last, self._device.mark()
        if before is not None:
            before.wait()

    def decode(self, images: Sequence[ImageInFlight]) -> list[RgbImage | NumericalError]:
        """Decode finished images of one size; what is not finite is an error for that image alone.

        Images do not meet in the decoder: each is normalized by itself.
        """
        chosen = _on_device(images)
        slots = self._slots_of(chosen[0])
        places = [_slot(image, slots) for image in chosen]
        most = self._max_decoded or len(places)
        parts = [slots.decode(places[n : n + most]) for n in range(0, len(places), most)]
        self._last = None  # everything is done
        self.release(images)
        return pictures_of(np.concatenate(parts))

    def release(self, images: Sequence[ImageInFlight]) -> None:
        for image in _on_device(images):
            image.leave()

    def preview(self, image: ImageInFlight) -> RgbImage | None:
        (on_device,) = _on_device([image])
        if on_device.place is None or not image.steps_done:
            return None
        slots, slot = on_device.place
        image.clean_prediction = slots.clean_prediction(slot)
        return super().preview(image)

    def current_latents(self, image: ImageInFlight) -> Latents:
        """Where an image stands; waits for the device."""
        (on_device,) = _on_device([image])
        if on_device.place is None:
            return image.latents
        slots, slot = on_device.place
        return slots.latents(slot)

    def _groups(self, images: Sequence["DeviceImage"]) -> Iterable[list["DeviceImage"]]:
        """As many images together as the rows of the plans allow."""
        group, rows = list[DeviceImage](), 0
        for image in images:
            if group and self._max_rows and rows + image.rows > self._max_rows:
                yield group
                group, rows = [], 0
            group.append(image)
            rows += image.rows
        yield group

    def _step(self, images: Sequence[DeviceImage]) -> None:
        slots = self._slots_of(images[0])
        slots.step(
            [
                SlotStep(
                    slot=_slot(image, slots),
                    weights=_weights(image),
                    first_row=len(image.weights) - image.rows,
                    row=image.row,
                    noise=image.generator.randn(image.latents.shape) if image.row.c else None,
                )
                for image in images
            ]
        )
        for image in images:
            image.steps_done += 1

    def _slots_of(self, image: DeviceImage) -> Slots:
        """The slots of an image's shape; those of shapes that nobody draws make room."""
        key = image.shape_key
        if key not in self._slots:
            for idle in [k for k, slots in self._slots.items() if not slots.in_use]:
                if len(self._slots) >= MAX_SHAPES:
                    del self._slots[idle]
            channels, height, width = image.latents.shape
            self._slots[key] = Slots(
                self._device,
                self._programs,
                latent_shape=(channels, height, width),
                row_shapes={name: values.shape[1:] for name, values in _kept(image).items()},
                history=self._history,
                scale_factor=self._latent_spec.scale_factor,
            )
        return self._slots[key]

    def _check_size(self, task: DenoisingTask) -> None:
        """Now, and not at the first step: whoever asked is still there to be told."""
        if len(task.weights) > ROWS_PER_IMAGE:
            raise InvalidRequest(
                f"an image of {len(task.weights)} rows; this backend takes {ROWS_PER_IMAGE}"
            )
        scale = self._latent_spec.scale_factor
        chunks, positions = task.texts[0][0].inputs_embeds.shape[:2]
        lengths = {"rows": len(task.weights), "tokens": chunks * positions, "batch": 1}
        latent = {**lengths, "height": task.height // scale, "width": task.width // scale}
        sizes = {"denoiser": latent, "vae_decoder": latent}
        if task.init_image is not None:
            sizes["vae_encoder"] = {**lengths, "height": task.height, "width": task.width}
        for name, sides in sizes.items():
            program = self._programs[name]
            if not program.takes(shapes_of(program.spec.inputs, sides)):
                raise InvalidRequest(
                    f"{task.width} x {task.height} pixels with {chunks} prompt chunk"
                    f"{'s' * (chunks > 1)}: {program.limits}",
                    field="width",
                )


def _on_device(images: Sequence[ImageInFlight]) -> list[DeviceImage]:
    assert all(isinstance(image, DeviceImage) for image in images), "images of another model"
    return [image for image in images if isinstance(image, DeviceImage)]


def _kept(image: DeviceImage) -> dict[str, np.ndarray]:
    """What each row of an image is told at every step."""
    return {"prompt_embeds": image.prompt_embeds, **image.added_inputs}


def _weights(image: DeviceImage) -> list[float]:
    """Of the rows of the next call: all of them, or the prompt's alone where nothing guides."""
    whole = image.rows == len(image.weights)
    return [float(weight) for weight in image.weights] if whole else [1.0]


def _slot(image: DeviceImage, slots: Slots) -> int:
    """The slot of an image; taken at its first step, so that who waits needs none."""
    if image.place is None:
        image.place = (slots, slots.take())
        slots.put(image.place[1], image.latents, _kept(image))
    return image.place[1]
