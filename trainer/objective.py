"""What is minimised: the denoiser's error on the training images, as a function of the vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float32, Int64
from torch import Tensor

from trainer.diffusion_loss import NoiseSchedule, diffusion_loss
from trainer.families import Family
from trainer.image_prompts import draw_prompts
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel
from trainer.splicing import TemplatePrompts
from trainer.text_encoder import PromptEncoder
from trainer.timesteps import stratified_timesteps

Vectors = Float32[Tensor, "num_vectors all_dims"]

# Every run is measured on the same noise, whatever its own seed.
_EVALUATION_SEED = 2208_01618
# In float16 what is below 6e-8 is zero, and the gradient of a mean over tens of thousands of
# numbers comes close to that: it is computed this many times larger (a power of 2: no rounding).
_GRADIENT_SCALES = {torch.float16: 2.0**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Everything random about one step, drawn."""

    latents: Float32[Tensor, "batch channels height width"]
    noise: Float32[Tensor, "batch channels height width"]
    timesteps: Int64[Tensor, " batch"]
    templates: Int64[Tensor, " batch"]
    weights: Float32[Tensor, "batch 1 height width"]  # of the error at each place, mean 1
    images: Int64[Tensor, " batch"]  # which image a sample is of

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, rows: Int64[Tensor, " rows"]) -> "Batch":
        """The samples at these places, in this order."""
        return Batch(**{name: tensor[rows] for name, tensor in self._tensors().items()})

    def split(self, size: int) -> list["Batch"]:
        """The same samples in batches of at most `size`."""
        return [self.take(rows) for rows in torch.arange(len(self)).split(size)]

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in self._tensors().items()})

    @classmethod
    def joined(cls, batches: Sequence["Batch"]) -> "Batch":
        """The samples of all, in order."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: torch.cat([getattr(b, name) for b in batches]) for name in names})

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The loss of one concept: frozen model, encoded images, laid-out prompts.

    Vectors are those for each text encoder side by side, `sum(dims)` wide.
    """

    family: Family
    dims: tuple[int, ...]  # of the token embeddings of each text encoder
    scale_factor: int  # pixels per latent
    prompt_encoder: PromptEncoder
    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    latents: LatentDistribution
    weights: Float32[Tensor, "images 1 height width"]  # of the errors, mean 1 for each image
    prompts: TemplatePrompts
    choices: tuple[range, ...]  # for each image: the prompts that it may have

    @classmethod
    def of(
        cls,
        model: DiffusionModel,
        latents: LatentDistribution,
        prompts: TemplatePrompts,
        *,
        choices: Sequence[range] = (),
        masks: Float32[Tensor, "images 1 pixels_high pixels_wide"] | None = None,
    ) -> Self:
        """Without `choices` any image may have any prompt, without `masks` all of it counts."""
        return cls(
            family=model.family,
            dims=model.dims,
            scale_factor=model.scale_factor,
            prompt_encoder=PromptEncoder.of(model),
            unet=model.unet,
            schedule=NoiseSchedule.from_config(model.scheduler_config).to(model.unet.device),
            latents=latents,
            weights=error_weights(masks, latents.mean),
            prompts=prompts.to(model.unet.device),
            choices=tuple(choices) or (range(len(prompts)),) * len(latents),
        )

    @property
    def num_slots(self) -> int:
        """Vectors that a sentence takes."""
        return self.prompts.slots.shape[1]

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        """A training batch: balanced over images and timesteps, latents sampled.

        Drawn on the CPU, so that a seed means the same on every device.
        """
        images = _balanced(len(self.latents), batch_size, generator)
        mean, std = self.latents.mean[images], self.latents.std[images]
        sampled = mean + std * torch.randn(mean.shape, generator=generator)
        return self._batch(images, sampled, generator)

    def draw_evaluation(self, batch_size: int) -> Batch:
        """The fixed batch: the same for every step, run and seed on the same images.

        Images take turns; where there are more than `batch_size`, each has one sample.
        """
        generator = torch.Generator().manual_seed(_EVALUATION_SEED)
        images = torch.arange(max(batch_size, len(self.latents))) % len(self.latents)
        return self._batch(images, self.latents.mean[images], generator)

    def _batch(
        self,
        images: Int64[Tensor, " batch"],
        latents: Float32[Tensor, "batch channels height width"],
        generator: torch.Generator,
    ) -> Batch:
        timesteps = self.schedule.num_train_timesteps
        return Batch(
            latents=latents,
            noise=torch.randn(latents.shape, generator=generator),
            timesteps=stratified_timesteps(len(images), timesteps, generator),
            templates=draw_prompts(self.choices, images, generator),
            weights=self.weights[images],
            images=images,
        )

    def losses(
        self, vectors: Float32[Tensor, "*rows num_vectors all_dims"], batch: Batch
    ) -> Float32[Tensor, " batch"]:
        """The loss of each sample, with the same vectors for all or with its own.

        Differentiable in `vectors` alone.
        """
        return joint_losses([Trial(objective=self, vectors=vectors, batch=batch)])

    def loss_and_gradient(self, vectors: Vectors, batch: Batch) -> tuple[float, Vectors]:
        """The mean loss of a batch, and its gradient in the vectors; no other gradient is made."""
        leaf = vectors.detach().clone().requires_grad_(True)
        loss = self.losses(leaf, batch).mean()
        (gradient,) = self.gradients(loss, [leaf])
        return loss.item(), gradient

    def gradients(self, loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of a loss in each of the leaves, without loss of small ones."""
        scale = _GRADIENT_SCALES.get(self.unet.dtype, 1.0)
        return [found / scale for found in torch.autograd.grad(scale * loss, leaves)]

    @torch.no_grad()
    def evaluate(self, vectors: Vectors, batch: Batch, *, at_once: int) -> float:
        """The mean loss of a batch, `at_once` samples at a time to bound memory."""
        parts = [self.losses(vectors, part) for part in batch.split(at_once)]
        return torch.cat(parts).mean().item()

    def encoder_inputs(
        self, vectors: Float32[Tensor, "*rows num_vectors all_dims"], batch: Batch
    ) -> list[tuple[Float32[Tensor, "batch tokens dim"], Int64[Tensor, " batch"]]]:
        """For each text encoder: embeddings of the samples' prompts, and where EOS stands."""
        device = self.unet.device
        templates = batch.templates.to(device)
        parts = vectors.to(device).split(self.dims, dim=-1)
        return [
            (one.splice(part, templates), one.eos_index[templates])
            for one, part in zip(self.prompts.of_encoders, parts, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A batch of one concept, and the vectors to try on it."""

    objective: Objective
    vectors: Float32[Tensor, "*rows num_vectors all_dims"]
    batch: Batch


def joint_losses(trials: Sequence[Trial]) -> Float32[Tensor, " rows"]:
    """The loss of each row of several concepts of one model, one after another, in one pass.

    No row depends on another: a concept has the loss that it would have alone.
    """
    model = trials[0].objective
    batch = Batch.joined([trial.batch for trial in trials]).to(model.unet.device)
    inputs = [trial.objective.encoder_inputs(trial.vectors, trial.batch) for trial in trials]
    of_encoders = [tuple(zip(*encoder, strict=True)) for encoder in zip(*inputs, strict=True)]
    prompt_embeds, pooled = model.prompt_encoder(
        [torch.cat(embeds) for embeds, _ in of_encoders],
        [torch.cat(eos_index) for _, eos_index in of_encoders],
    )
    height, width = (model.scale_factor * side for side in batch.latents.shape[-2:])
    return diffusion_loss(
        model.unet,
        model.schedule,
        latents=batch.latents,
        noise=batch.noise,
        timesteps=batch.timesteps,
        prompt_embeds=prompt_embeds,
        added_inputs=model.family.added_inputs(pooled, width=width, height=height),
        weights=batch.weights,
    )


def error_weights(
    masks: Float32[Tensor, "images 1 pixels_high pixels_wide"] | None,
    latents: Float32[Tensor, "images channels height width"],
) -> Float32[Tensor, "images 1 height width"]:
    """How much the error counts at each latent: the mask's average there, scaled to a mean of 1.

    The weighted mean is then sum(mask x error) / sum(mask), and one of all errors without a mask.
    """
    if masks is None:
        return torch.ones_like(latents[:, :1])
    small = torch.nn.functional.interpolate(masks, size=latents.shape[-2:], mode="area")
    return small / small.mean(dim=(1, 2, 3), keepdim=True)


def _balanced(
    num_images: int, batch_size: int, generator: torch.Generator
) -> Int64[Tensor, " batch"]:
    """Indices of images: each comes up equally often, to within one, in random order."""
    rounds = -(-batch_size // num_images)
    shuffled = [torch.randperm(num_images, generator=generator) for _ in range(rounds)]
    return torch.cat(shuffled)[:batch_size]
