"""What a request is told while it runs: steps, images, and how it ended."""

from dataclasses import dataclass

from engine.requests import RgbImage


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One image has advanced, by one step or by some that a model made in a row.

    Told again if a worker died and the image began anew.
    """

    image_index: int
    step: int  # how many are done, 1 to num_steps
    num_steps: int  # denoiser calls of this image
    preview: RgbImage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDone:
    """One image is finished; told once."""

    image_index: int
    seed: int
    image: RgbImage
    is_last: bool = False  # of its request, whose end is told right after it


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of a request went; wall clock, shared calls counted in full."""

    queue_wait_ms: float  # until its first image was admitted
    denoise_ms: float  # text encoding and steps, until the last image left
    decode_ms: float
    total_ms: float
    denoiser_calls: int
    mean_batch_rows: float  # rows in the calls that it shared, its own included


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All images are done; the last event of a request that succeeded."""

    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The last event of a request that did not."""

    error: Exception


Event = StepDone | ImageDone | Finished | Failed
