"""From a request to images in flight, one denoiser call at a time.

`plan` is host work (engine/planner.py) and may run on any thread; everything else calls the model
and belongs to the one thread that owns the device (engine/batching/batcher.py), or to a process of
its own (engine/worker/model_worker.py).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from engine.bundle import Bundle
from engine.errors import NumericalError
from engine.families import Conditioning, added_input_names, fill_added_inputs
from engine.guidance import GuidedCalls
from engine.images import to_float, to_uint8
from engine.noise import TorchGenerator
from engine.planner import DenoisingTask, GenerationPlan, Planner, TextRows
from engine.prepared_graphs import usual_graphs
from engine.prompts import apply_weights
from engine.requests import Limits, RgbImage
from engine.samplers import Latents, StepCoefficients, Trajectory, predict_clean, step
from engine.sessions import CPU_PROVIDER, Session

PROMPT_CACHE_BYTES = 64 << 20
PromptEmbeds = Float32[np.ndarray, "tokens dim"]


@dataclass(slots=True, eq=False)
class ImageInFlight:
    """One image between its first latents and its last step."""

    seed: int
    trajectory: Trajectory
    prompt_embeds: Float32[np.ndarray, "rows tokens dim"]
    weights: Float32[np.ndarray, " rows"]
    generator: TorchGenerator
    latents: Latents
    guided_calls: GuidedCalls | None = None  # None: all of them
    history: tuple[Latents, ...] = ()
    steps_done: int = 0
    clean_prediction: Latents | None = None  # of the last step; what a preview shows
    added_inputs: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])  # [rows, _]

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch that its next call takes: the last one, or all."""
        if self.guided_calls is None or self.is_done or self.steps_done in self.guided_calls:
            return len(self.weights)
        return 1

    @property
    def num_steps(self) -> int:
        """Denoiser calls from beginning to end."""
        return len(self.trajectory.rows)

    @property
    def is_done(self) -> bool:
        return self.steps_done == self.num_steps

    @property
    def row(self) -> StepCoefficients:
        return self.trajectory.rows[self.steps_done]

    @property
    def shape_key(self) -> tuple[int, ...]:
        """Images with the same key can share a denoiser call."""
        return (*self.latents.shape[1:], self.prompt_embeds.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """What a text encoder gives for one prompt."""

    prompt_embeds: PromptEmbeds  # of all chunks, joined along the tokens
    pooled: Float32[np.ndarray, " pooled_dim"]  # of the first chunk; nothing where not asked for

    @property
    def nbytes(self) -> int:
        return self.prompt_embeds.nbytes + self.pooled.nbytes


class TextEncoder:
    """A text-encoder graph behind a cache keyed by what goes in: embeddings, not words."""

    def __init__(
        self, session: Session, *, pools: bool = False, cache_bytes: int = PROMPT_CACHE_BYTES
    ) -> None:
        self._session = session
        self._pools = pools
        self._cache: OrderedDict[bytes, EncodedPrompt] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0

    def encode(self, texts: Sequence[TextRows]) -> list[EncodedPrompt]:
        """Encode prompts in one call."""
        keys = [_cache_key(text) for text in texts]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        missing = {k: t for k, t in zip(keys, texts, strict=True) if k not in found}
        if missing:
            found |= zip(missing, self._run(list(missing.values())), strict=True)
        for key in keys:
            self._remember(key, found[key])
        return [found[key] for key in keys]

    def _run(self, texts: Sequence[TextRows]) -> list[EncodedPrompt]:
        outputs = self._session.run(
            {
                "inputs_embeds": np.concatenate([text.inputs_embeds for text in texts]),
                "eos_index": np.concatenate([text.eos_index for text in texts]),
            }
        )
        hidden = outputs["prompt_embeds"].astype(np.float32)
        ends = np.cumsum([len(text.eos_index) for text in texts])
        pooled = outputs["pooled"].astype(np.float32) if self._pools else hidden[:, 0, :0]
        return [
            EncodedPrompt(
                prompt_embeds=apply_weights(rows, text.weights).reshape(-1, hidden.shape[-1]),
                pooled=first_chunk,
            )
            for text, rows, first_chunk in zip(
                texts, np.split(hidden, ends[:-1]), pooled[[0, *ends[:-1]]], strict=True
            )
        ]

    def _remember(self, key: bytes, encoded: EncodedPrompt) -> None:
        if key not in self._cache:
            self._cache[key] = encoded
            self._cached_bytes += encoded.nbytes
        self._cache.move_to_end(key)
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes


def _cache_key(text: TextRows) -> bytes:
    digest = hashlib.sha256(text.inputs_embeds.tobytes())
    digest.update(text.eos_index.tobytes())
    digest.update(text.weights.tobytes())
    return digest.digest()


class ImageModel:
    """The half of a model that owns the graphs: text encoders, denoiser and autoencoder.

    It meets numbers only (`DenoisingTask`); prompts, tokenizers and tables are the planner's.
    """

    def __init__(self, bundle: Bundle, sessions: dict[str, Session]) -> None:
        self._latent_spec = bundle.manifest.latents
        self._latent_rgb = bundle.latent_rgb
        self._added_inputs = added_input_names(bundle.manifest)
        self._text_encoders = tuple(
            TextEncoder(sessions[one.component], pools=bool(self._added_inputs))
            for one in bundle.vocabularies
        )
        self._denoiser = sessions["denoiser"]
        self._vae_decoder = sessions["vae_decoder"]
        self._vae_encoder = sessions["vae_encoder"]

    def begin(self, plan: GenerationPlan) -> list[ImageInFlight]:
        """Encode the prompts and draw the first latents of every image of a request."""
        return self.begin_task(plan.task)

    def begin_task(self, task: DenoisingTask) -> list[ImageInFlight]:
        """`begin`, for a request that was planned elsewhere."""
        prompt_embeds, pooled = self._encode(task)
        conditioning = Conditioning(pooled=pooled, width=task.width, height=task.height)
        added_inputs = fill_added_inputs(self._added_inputs, conditioning)
        posterior = None
        if task.init_image is not None:
            posterior = self._encode_image(to_float(task.init_image))
        images: list[ImageInFlight] = []
        for seed in task.seeds:
            generator = TorchGenerator(seed)
            images.append(
                ImageInFlight(
                    seed=seed,
                    trajectory=task.trajectory,
                    prompt_embeds=prompt_embeds,
                    weights=np.array(task.weights, np.float32),
                    generator=generator,
                    latents=self._first_latents(task, generator, posterior),
                    guided_calls=task.guided_calls,
                    added_inputs=added_inputs,
                )
            )
        return images

    def _encode(
        self, task: DenoisingTask
    ) -> tuple[Float32[np.ndarray, "rows tokens dim"], Float32[np.ndarray, "rows pooled_dim"]]:
        """The encoders' outputs side by side, and what the last of them pools."""
        encoded = [
            encoder.encode(texts)
            for encoder, texts in zip(self._text_encoders, task.texts, strict=True)
        ]
        prompt_embeds = np.concatenate(
            [np.stack([row.prompt_embeds for row in rows]) for rows in encoded], axis=-1
        )
        pooled = np.stack([row.pooled for row in encoded[-1]])
        if task.zero_negative:
            prompt_embeds[0], pooled[0] = 0.0, 0.0
        return prompt_embeds, pooled

    def _first_latents(
        self,
        task: DenoisingTask,
        generator: TorchGenerator,
        posterior: tuple[Latents, Latents] | None,
    ) -> Latents:
        """Draws in the order of diffusers' pipelines: the posterior's sample first, then noise."""
        spec = self._latent_spec
        shape = (spec.channels, task.height // spec.scale_factor, task.width // spec.scale_factor)
        if posterior is None:
            return generator.randn(shape) * task.trajectory.init_sigma
        mean, std = posterior
        clean = mean + std * generator.randn(shape)
        first = task.trajectory.rows[0]
        return first.k0 * clean + first.k1 * generator.randn(shape)

    def _encode_image(
        self, image: Float32[np.ndarray, "1 3 image_height image_width"]
    ) -> tuple[Latents, Latents]:
        outputs = self._vae_encoder.run({"images": image})
        return outputs["mean"][0].astype(np.float32), outputs["std"][0].astype(np.float32)

    def step(self, images: Sequence[ImageInFlight], *, at_most: int = 1) -> None:
        """Advance images by one row each, in one denoiser call; all have the same `shape_key`.

        An image is the same, to rounding, whatever shares its call. One call, however many may be.
        """
        rows = np.array([image.rows for image in images])
        outputs = self._denoiser.run(
            {
                "latents": np.repeat(
                    np.stack([image.row.s * image.latents for image in images]), rows, axis=0
                ),
                "timestep": np.repeat([image.row.timestep for image in images], rows),
                "prompt_embeds": np.concatenate(
                    [image.prompt_embeds[-image.rows :] for image in images]
                ),
                **{
                    name: np.concatenate(
                        [image.added_inputs[name][-image.rows :] for image in images]
                    )
                    for name in self._added_inputs
                },
            }
        )
        predictions = np.split(outputs["noise_pred"].astype(np.float32), np.cumsum(rows)[:-1])
        for image, prediction in zip(images, predictions, strict=True):
            whole = image.rows == len(image.weights)
            _advance(image, _guided(image.weights, prediction) if whole else prediction[0])

    def decode(self, images: Sequence[ImageInFlight]) -> list[RgbImage | NumericalError]:
        """Decode finished images of one size; what is not finite is an error for that image alone.

        Its batch mates are decoded without it.
        """
        finite = [bool(np.isfinite(image.latents).all()) for image in images]
        sound = [image.latents for image, ok in zip(images, finite, strict=True) if ok]
        pictures = iter(self._decode_latents(np.stack(sound)) if sound else ())
        return [next(pictures) if ok else _not_finite() for ok in finite]

    def _decode_latents(
        self, latents: Float32[np.ndarray, "batch channels latent_height latent_width"]
    ) -> list[RgbImage | NumericalError]:
        return pictures_of(self._vae_decoder.run({"latents": latents})["images"])

    def release(self, images: Sequence[ImageInFlight]) -> None:
        """Images that leave early hold nothing but their own memory: nothing to do."""

    def hold(self) -> None:
        """Nothing is begun unasked in this process."""

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether calls can succeed: always, in this process."""
        return True

    def row_cost(self, image: ImageInFlight) -> float:
        """Memory of one row relative to the model's own size: attention grows with area squared."""
        area = image.latents[0].size * self._latent_spec.scale_factor**2
        return max(1.0, (area / self._latent_spec.default_size**2) ** 2)

    def preview(self, image: ImageInFlight) -> RgbImage | None:
        """The clean image that the model expects, one pixel per latent, by a linear map."""
        if image.clean_prediction is None:
            return None
        weight, bias = self._latent_rgb[:-1], self._latent_rgb[-1]
        rgb = np.tensordot(weight, image.clean_prediction, axes=(0, 0)) + bias[:, None, None]
        return to_uint8(rgb[None])[0]


class Pipeline(Planner, ImageModel):
    """A loaded model with both of its halves in this process."""

    def __init__(self, bundle: Bundle, sessions: dict[str, Session], *, limits: Limits) -> None:
        Planner.__init__(self, bundle, limits=limits)
        ImageModel.__init__(self, bundle, sessions)

    @classmethod
    def open(
        cls,
        bundle_path: Path,
        *,
        execution_provider: str = CPU_PROVIDER,
        limits: Limits | None = None,
    ) -> "Pipeline":
        """Verify a bundle and load its graphs, once and for all concepts."""
        bundle = Bundle.open(bundle_path)
        return cls(bundle, open_sessions(bundle, execution_provider), limits=limits or Limits())


def open_sessions(bundle: Bundle, execution_provider: str) -> dict[str, Session]:
    """Load every graph of a bundle, as this processor wants it where it was prepared."""
    prepared = usual_graphs() if execution_provider == CPU_PROVIDER else None
    return {
        name: bundle.open_session(name, execution_provider=execution_provider, prepared=prepared)
        for name in bundle.manifest.components
    }


def pictures_of(
    images: Float[np.ndarray, "batch 3 height width"],
) -> list[RgbImage | NumericalError]:
    """What the decoder gives, in 8 bits; what is not finite is an error for that image alone."""
    pixels = images.astype(np.float32)
    finite = [bool(np.isfinite(one).all()) for one in pixels]
    pictures = to_uint8(np.nan_to_num(pixels))
    return [p if ok else _not_finite() for p, ok in zip(pictures, finite, strict=True)]


def sound(results: Sequence[RgbImage | NumericalError]) -> list[RgbImage]:
    """The pictures of `decode`; raises the first that is an error."""
    for result in results:
        if isinstance(result, NumericalError):
            raise result
    return [result for result in results if not isinstance(result, NumericalError)]


def _not_finite() -> NumericalError:
    return NumericalError(
        "the model produced NaN or infinite values; use a bundle built with --precision fp32, a "
        "lower guidance_scale, or another concept"
    )


def _guided(
    weights: Float32[np.ndarray, " rows"],
    prediction: Float32[np.ndarray, "rows channels height width"],
) -> Latents:
    """The sum of the weighted rows, from the left: rounded alike on every processor and device.

    A product of matrices is rounded as its library likes.
    """
    guided = weights[0] * prediction[0]
    for weight, row in zip(weights[1:], prediction[1:], strict=True):
        guided += weight * row
    return guided


def _advance(image: ImageInFlight, noise_pred: Latents) -> None:
    row = image.row
    noise = image.generator.randn(image.latents.shape) if row.c != 0.0 else None
    image.clean_prediction = predict_clean(image.latents, noise_pred, row)
    image.latents, image.history = step(image.latents, noise_pred, image.history, noise, row)
    image.steps_done += 1
