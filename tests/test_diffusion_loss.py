"""The loss: noise, targets, timesteps and latents against diffusers' own."""

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from tests import learning_setup
from trainer.diffusion_loss import NoiseSchedule, add_noise, diffusion_loss, prediction_target
from trainer.images import TrainingImages
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel
from trainer.timesteps import stratified_timesteps

# Fixtures.
model_path, model, images = learning_setup.model_path, learning_setup.model, learning_setup.images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_target_are_those_of_diffusers(prediction_type: str, zero_snr: bool) -> None:
    config: dict[str, Any] = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
    }
    scheduler: Any = DDPMScheduler(**config)
    schedule = NoiseSchedule.from_config(config)
    latents, noise = torch.randn((2, 5, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    expected = noise
    if prediction_type == "v_prediction":
        expected = scheduler.get_velocity(latents, noise, timesteps)
    # The same formula in float32; the order of operations may differ by an ulp or two.
    torch.testing.assert_close(
        add_noise(schedule, latents, noise, timesteps),
        scheduler.add_noise(latents, noise, timesteps),
        rtol=1e-6,
        atol=1e-6,
    )
    target = prediction_target(schedule, latents, noise, timesteps)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_loss_is_zero_for_a_perfect_denoiser_and_known_for_a_constant_one() -> None:
    schedule = NoiseSchedule.from_config({"prediction_type": "epsilon"})
    latents, noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0))

    class Answers:
        dtype = torch.float32

        def __init__(self, answer: Tensor) -> None:
            self.answer = answer

        def __call__(self, *_: object, **__: object) -> tuple[Tensor]:
            return (self.answer,)

    def loss(answer: Tensor) -> Tensor:
        unet: Any = Answers(answer)
        timesteps, prompt_embeds = torch.tensor([1, 5, 900]), torch.zeros(3, 2, 2)
        return diffusion_loss(
            unet,
            schedule,
            latents=latents,
            noise=noise,
            timesteps=timesteps,
            prompt_embeds=prompt_embeds,
        )

    assert loss(noise).tolist() == [0.0, 0.0, 0.0]
    # Off by 1, 2 and 3 everywhere: 1, 4 and 9, to the rounding of float32 sums.
    offset = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    torch.testing.assert_close(loss(noise + offset), torch.tensor([1.0, 4.0, 9.0]))


def test_timesteps_have_one_in_each_part_of_the_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        timesteps = stratified_timesteps(8, 1000, generator)
        assert sorted((timesteps // 125).tolist()) == list(range(8))


def test_every_timestep_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([stratified_timesteps(4, 10, generator) for _ in range(5000)])
    counts = torch.bincount(drawn, minlength=10)
    # 20,000 draws into ten bins: 2,000 each, deviation at most 42; six deviations.
    assert (counts - 2000).abs().max() < 6 * 42


def test_latents_are_the_posterior_of_the_autoencoder(
    model: DiffusionModel, images: TrainingImages
) -> None:
    encoded: Any = model.vae.encode(images.pixels)
    posterior = encoded.latent_dist
    latents = LatentDistribution.encode(model, images.pixels)
    # One image at a time or all at once: the same convolutions in another order.
    torch.testing.assert_close(latents.mean, posterior.mean * 0.3, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(latents.std, posterior.std * 0.3, rtol=1e-4, atol=1e-6)
