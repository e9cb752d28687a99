"""What is minimised: the denoiser's error on the training images, as a function of the vectors."""

from dataclasses import dataclass
from typing import Self

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float32, Int64
from torch import Tensor

from trainer.diffusion_loss import NoiseSchedule, diffusion_loss, stratified_timesteps
from trainer.families import Family
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel
from trainer.splicing import TemplatePrompts
from trainer.text_encoder import PromptEncoder

# Every run is measured on the same noise, whatever its own seed.
_EVALUATION_SEED = 2208_01618


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Everything random about one step, drawn."""

    latents: Float32[Tensor, "batch channels height width"]
    noise: Float32[Tensor, "batch channels height width"]
    timesteps: Int64[Tensor, " batch"]
    templates: Int64[Tensor, " batch"]

    def split(self, size: int) -> list["Batch"]:
        """The same samples in batches of at most `size`."""
        parts = zip(
            self.latents.split(size),
            self.noise.split(size),
            self.timesteps.split(size),
            self.templates.split(size),
            strict=True,
        )
        return [Batch(latents=a, noise=b, timesteps=c, templates=d) for a, b, c, d in parts]

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            templates=self.templates.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The loss of one run: frozen model, encoded images, laid-out templates.

    Vectors are those for each text encoder side by side, `sum(dims)` wide.
    """

    family: Family
    dims: tuple[int, ...]  # of the token embeddings of each text encoder
    scale_factor: int  # pixels per latent
    prompt_encoder: PromptEncoder
    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    latents: LatentDistribution
    prompts: TemplatePrompts

    @classmethod
    def of(
        cls, model: DiffusionModel, latents: LatentDistribution, prompts: TemplatePrompts
    ) -> Self:
        return cls(
            family=model.family,
            dims=model.dims,
            scale_factor=model.scale_factor,
            prompt_encoder=PromptEncoder.of(model),
            unet=model.unet,
            schedule=NoiseSchedule.from_config(model.scheduler_config).to(model.unet.device),
            latents=latents,
            prompts=prompts.to(model.unet.device),
        )

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        """A training batch: balanced over images and timesteps, latents sampled.

        Drawn on the CPU, so that a seed means the same on every device.
        """
        images = _balanced(len(self.latents), batch_size, generator)
        mean, std = self.latents.mean[images], self.latents.std[images]
        sampled = mean + std * torch.randn(mean.shape, generator=generator)
        return self._batch(sampled, generator)

    def draw_evaluation(self, batch_size: int) -> Batch:
        """The fixed batch: the same for every step, run and seed on the same images.

        Images take turns; where there are more than `batch_size`, each has one sample.
        """
        generator = torch.Generator().manual_seed(_EVALUATION_SEED)
        images = torch.arange(max(batch_size, len(self.latents))) % len(self.latents)
        return self._batch(self.latents.mean[images], generator)

    def _batch(
        self, latents: Float32[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Batch:
        size = len(latents)
        return Batch(
            latents=latents,
            noise=torch.randn(latents.shape, generator=generator),
            timesteps=stratified_timesteps(size, self.schedule.num_train_timesteps, generator),
            templates=torch.randint(len(self.prompts), (size,), generator=generator),
        )

    def losses(
        self, vectors: Float32[Tensor, "num_vectors dim"], batch: Batch
    ) -> Float32[Tensor, " batch"]:
        """The loss of each sample; differentiable in `vectors` alone."""
        device = self.unet.device
        batch = batch.to(device)
        parts = vectors.to(device).split(self.dims, dim=1)
        prompts = self.prompts.of_encoders
        prompt_embeds, pooled = self.prompt_encoder(
            [one.splice(part, batch.templates) for one, part in zip(prompts, parts, strict=True)],
            [one.eos_index[batch.templates] for one in prompts],
        )
        height, width = (self.scale_factor * side for side in batch.latents.shape[-2:])
        return diffusion_loss(
            self.unet,
            self.schedule,
            latents=batch.latents,
            noise=batch.noise,
            timesteps=batch.timesteps,
            prompt_embeds=prompt_embeds,
            added_inputs=self.family.added_inputs(pooled, width=width, height=height),
        )

    def loss_and_gradient(
        self, vectors: Float32[Tensor, "num_vectors dim"], batch: Batch
    ) -> tuple[float, Float32[Tensor, "num_vectors dim"]]:
        """The mean loss of a batch, and its gradient in the vectors; no other gradient is made."""
        parameter = vectors.detach().clone().requires_grad_(True)
        loss = self.losses(parameter, batch).mean()
        (gradient,) = torch.autograd.grad(loss, parameter)
        return loss.item(), gradient

    @torch.no_grad()
    def evaluate(
        self, vectors: Float32[Tensor, "num_vectors dim"], batch: Batch, *, at_once: int
    ) -> float:
        """The mean loss of a batch, `at_once` samples at a time to bound memory."""
        parts = [self.losses(vectors, part) for part in batch.split(at_once)]
        return torch.cat(parts).mean().item()


def _balanced(
    num_images: int, batch_size: int, generator: torch.Generator
) -> Int64[Tensor, " batch"]:
    """Indices of images: each comes up equally often, to within one, in random order."""
    rounds = -(-batch_size // num_images)
    shuffled = [torch.randperm(num_images, generator=generator) for _ in range(rounds)]
    return torch.cat(shuffled)[:batch_size]
