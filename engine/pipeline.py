"""From a request to images in flight, one denoiser call at a time.

`plan` is host work (checks, tokens, coefficients) and may run on any thread; everything else calls
the model and belongs to the one thread that owns the device (engine/batcher.py).
"""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from engine.bundle import Bundle
from engine.concepts import Concept, check_fits
from engine.families import Conditioning, added_input_names, fill_added_inputs
from engine.images import resize, to_float, to_uint8
from engine.noise import TorchGenerator
from engine.prompts import EncoderInput, PromptReader, PromptReport, apply_weights
from engine.requests import MAX_SEED, GenerationRequest, Limits, RgbImage, check_request
from engine.samplers import Latents, StepCoefficients, Trajectory, predict_clean, step
from engine.sessions import Session

PROMPT_CACHE_BYTES = 64 << 20
PromptEmbeds = Float32[np.ndarray, "tokens dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """A checked request: all that can be known before the model is called."""

    request: GenerationRequest
    width: int  # pixels
    height: int
    trajectory: Trajectory
    texts: tuple[tuple[EncoderInput, ...], ...]  # by text encoder; one per row of the denoiser
    weights: tuple[float, ...]  # guidance: one per row, summing to 1
    prompt_report: PromptReport
    negative_report: PromptReport | None  # None where guidance is off
    zero_negative: bool = False  # the first row's text is zeros

    @property
    def matched(self) -> tuple[Concept, ...]:
        """The concepts that the prompts use, each once."""
        reports = [r for r in (self.prompt_report, self.negative_report) if r]
        return tuple({c.placeholder_token: c for r in reports for c in r.matched}.values())


@dataclass(slots=True, eq=False)
class ImageInFlight:
    """One image between its first latents and its last step."""

    seed: int
    trajectory: Trajectory
    prompt_embeds: Float32[np.ndarray, "rows tokens dim"]
    weights: Float32[np.ndarray, " rows"]
    generator: TorchGenerator
    latents: Latents
    history: tuple[Latents, ...] = ()
    steps_done: int = 0
    clean_prediction: Latents | None = None  # of the last step; what a preview shows
    added_inputs: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])  # [rows, _]

    @property
    def is_done(self) -> bool:
        return self.steps_done == len(self.trajectory.rows)

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

    def encode(self, texts: Sequence[EncoderInput]) -> list[EncodedPrompt]:
        """Encode prompts in one call."""
        keys = [_cache_key(text) for text in texts]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        missing = {k: t for k, t in zip(keys, texts, strict=True) if k not in found}
        if missing:
            found |= zip(missing, self._run(list(missing.values())), strict=True)
        for key in keys:
            self._remember(key, found[key])
        return [found[key] for key in keys]

    def _run(self, texts: Sequence[EncoderInput]) -> list[EncodedPrompt]:
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


def _cache_key(text: EncoderInput) -> bytes:
    digest = hashlib.sha256(text.inputs_embeds.tobytes())
    digest.update(text.eos_index.tobytes())
    digest.update(text.weights.tobytes())
    return digest.digest()


class Pipeline:
    """A loaded model: text encoders, denoiser and autoencoder behind the words of the sampler."""

    def __init__(self, bundle: Bundle, sessions: dict[str, Session], *, limits: Limits) -> None:
        self.bundle = bundle
        self.limits = limits.for_model(bundle.manifest)
        self._readers = tuple(
            PromptReader(one.tokenizer, one.token_embedding, one.text, encoder=index)
            for index, one in enumerate(bundle.vocabularies)
        )
        self._added_inputs = added_input_names(bundle.manifest)
        self._text_encoders = tuple(
            TextEncoder(sessions[one.component], pools=bool(self._added_inputs))
            for one in bundle.vocabularies
        )
        self._denoiser = sessions["denoiser"]
        self._vae_decoder = sessions["vae_decoder"]
        self._vae_encoder = sessions["vae_encoder"]

    @property
    def reader(self) -> PromptReader:
        """The reader of the first text encoder, whose reports are told."""
        return self._readers[0]

    @classmethod
    def open(
        cls,
        bundle_path: Path,
        *,
        execution_provider: str = "CPUExecutionProvider",
        limits: Limits | None = None,
    ) -> "Pipeline":
        """Verify a bundle and load its graphs, once and for all concepts."""
        bundle = Bundle.open(bundle_path)
        sessions: dict[str, Session] = {
            name: bundle.open_session(name, execution_provider=execution_provider)
            for name in bundle.manifest.components
        }
        return cls(bundle, sessions, limits=limits or Limits())

    def plan(self, request: GenerationRequest) -> GenerationPlan:
        """Check a request and do all host work; raises what the caller can mend."""
        manifest, tables = self.bundle.manifest, self.bundle.sampler_tables
        width, height, trajectory = check_request(
            request, manifest=manifest, samplers=tables, limits=self.limits
        )
        for concept in request.concepts:
            check_fits(
                concept,
                manifest.text,
                text_2=manifest.text_2,
                model_name=manifest.model_name,
            )
        texts = [_read(reader, request) for reader in self._readers]
        num_chunks = max(text.report.num_chunks for rows in texts for text in rows)
        *negative, prompt = texts[0]
        return GenerationPlan(
            request=_fitted(request, width, height),
            width=width,
            height=height,
            trajectory=trajectory,
            texts=tuple(
                tuple(reader.pad(text, num_chunks) for text in rows)
                for reader, rows in zip(self._readers, texts, strict=True)
            ),
            weights=(1.0 - request.guidance_scale, request.guidance_scale) if negative else (1.0,),
            prompt_report=prompt.report,
            negative_report=negative[0].report if negative else None,
            zero_negative=bool(
                negative and manifest.zero_empty_negative and not request.negative_prompt
            ),
        )

    def begin(self, plan: GenerationPlan) -> list[ImageInFlight]:
        """Encode the prompts and draw the first latents of every image of a request."""
        request = plan.request
        prompt_embeds, pooled = self._encode(plan)
        conditioning = Conditioning(pooled=pooled, width=plan.width, height=plan.height)
        added_inputs = fill_added_inputs(self._added_inputs, conditioning)
        posterior = None
        if request.init_image is not None:
            posterior = self._encode_image(to_float(request.init_image))
        images: list[ImageInFlight] = []
        for index in range(request.num_images):
            seed = (request.seed + index) % (MAX_SEED + 1)
            generator = TorchGenerator(seed)
            images.append(
                ImageInFlight(
                    seed=seed,
                    trajectory=plan.trajectory,
                    prompt_embeds=prompt_embeds,
                    weights=np.array(plan.weights, np.float32),
                    generator=generator,
                    latents=self._first_latents(plan, generator, posterior),
                    added_inputs=added_inputs,
                )
            )
        return images

    def _encode(
        self, plan: GenerationPlan
    ) -> tuple[Float32[np.ndarray, "rows tokens dim"], Float32[np.ndarray, "rows pooled_dim"]]:
        """The encoders' outputs side by side, and what the last of them pools."""
        encoded = [
            encoder.encode(texts)
            for encoder, texts in zip(self._text_encoders, plan.texts, strict=True)
        ]
        prompt_embeds = np.concatenate(
            [np.stack([row.prompt_embeds for row in rows]) for rows in encoded], axis=-1
        )
        pooled = np.stack([row.pooled for row in encoded[-1]])
        if plan.zero_negative:
            prompt_embeds[0], pooled[0] = 0.0, 0.0
        return prompt_embeds, pooled

    def _first_latents(
        self,
        plan: GenerationPlan,
        generator: TorchGenerator,
        posterior: tuple[Latents, Latents] | None,
    ) -> Latents:
        """Draws in the order of diffusers' pipelines: the posterior's sample first, then noise."""
        spec = self.bundle.manifest.latents
        shape = (spec.channels, plan.height // spec.scale_factor, plan.width // spec.scale_factor)
        if posterior is None:
            return generator.randn(shape) * plan.trajectory.init_sigma
        mean, std = posterior
        clean = mean + std * generator.randn(shape)
        first = plan.trajectory.rows[0]
        return first.k0 * clean + first.k1 * generator.randn(shape)

    def _encode_image(
        self, image: Float32[np.ndarray, "1 3 image_height image_width"]
    ) -> tuple[Latents, Latents]:
        outputs = self._vae_encoder.run({"images": image})
        return outputs["mean"][0].astype(np.float32), outputs["std"][0].astype(np.float32)

    def step(self, images: Sequence[ImageInFlight]) -> None:
        """Advance images by one row each, in one denoiser call; all have the same `shape_key`.

        An image is the same, to rounding, whatever shares its call.
        """
        rows = np.array([len(image.weights) for image in images])
        outputs = self._denoiser.run(
            {
                "latents": np.repeat(
                    np.stack([image.row.s * image.latents for image in images]), rows, axis=0
                ),
                "timestep": np.repeat([image.row.timestep for image in images], rows),
                "prompt_embeds": np.concatenate([image.prompt_embeds for image in images]),
                **{
                    name: np.concatenate([image.added_inputs[name] for image in images])
                    for name in self._added_inputs
                },
            }
        )
        predictions = np.split(outputs["noise_pred"].astype(np.float32), np.cumsum(rows)[:-1])
        for image, prediction in zip(images, predictions, strict=True):
            _advance(image, np.tensordot(image.weights, prediction, axes=1))

    def decode(self, images: Sequence[ImageInFlight]) -> list[RgbImage]:
        """Decode finished images of one size."""
        outputs = self._vae_decoder.run({"latents": np.stack([image.latents for image in images])})
        return to_uint8(outputs["images"].astype(np.float32))

    def row_cost(self, image: ImageInFlight) -> float:
        """Memory of one row relative to the model's own size: attention grows with area squared."""
        spec = self.bundle.manifest.latents
        area = image.latents[0].size * spec.scale_factor**2
        return max(1.0, (area / spec.default_size**2) ** 2)

    def preview(self, image: ImageInFlight) -> RgbImage | None:
        """The clean image that the model expects, one pixel per latent, by a linear map."""
        if image.clean_prediction is None:
            return None
        weight, bias = self.bundle.latent_rgb[:-1], self.bundle.latent_rgb[-1]
        rgb = np.tensordot(weight, image.clean_prediction, axes=(0, 0)) + bias[:, None, None]
        return to_uint8(rgb[None])[0]


def _read(reader: PromptReader, request: GenerationRequest) -> tuple[EncoderInput, ...]:
    """The prompts of a request as one text encoder reads them; the negative one first, if any."""
    prompt = reader.read(request.prompt, request.concepts)
    if request.guidance_scale == 1.0:
        return (prompt,)
    negative = reader.read(request.negative_prompt, request.concepts, field="negative_prompt")
    return (negative, prompt)


def _fitted(request: GenerationRequest, width: int, height: int) -> GenerationRequest:
    """The request with its initial image at the size of use, for a plan may wait long."""
    if request.init_image is None:
        return request
    return dataclasses.replace(request, init_image=resize(request.init_image, width, height))


def _advance(image: ImageInFlight, noise_pred: Latents) -> None:
    row = image.row
    noise = image.generator.randn(image.latents.shape) if row.c != 0.0 else None
    image.clean_prediction = predict_clean(image.latents, noise_pred, row)
    image.latents, image.history = step(image.latents, noise_pred, image.history, noise, row)
    image.steps_done += 1
