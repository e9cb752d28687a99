"""The settings of the recipe: what is trained, how large, on how much."""

from dataclasses import dataclass, replace

from models.recipe.objects import BASE_OBJECTS, SMALL_OBJECTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One size of the model and of its training. Counts of images, not steps, say how long."""

    name: str
    image_size: int
    slugs: tuple[str, ...]  # the objects that are named
    warmup_images: int  # until the learning rate is at its peak

    # Autoencoder
    latent_channels: int
    autoencoder_channels: tuple[int, ...]  # one level each; all but the last halve the resolution
    autoencoder_groups: int  # of GroupNorm; 8 channels a group or more, or flat colours are lost
    autoencoder_crop: int  # pixels; what most of the training sees, then whole pictures
    autoencoder_images: int
    autoencoder_batch: int
    autoencoder_rate: float

    # Text encoder and UNet
    vocabulary_size: int
    max_tokens: int
    text_width: int
    text_layers: int
    denoiser_channels: tuple[int, ...]
    denoiser_layers: int
    denoiser_heads: int
    denoiser_groups: int
    denoiser_images: int
    denoiser_batch: int
    denoiser_rate: float
    pool_images: int  # compositions that are encoded once and drawn from

    @property
    def downsampling(self) -> int:
        """Pixels a latent, along one side."""
        return 2 ** (len(self.autoencoder_channels) - 1)

    @property
    def latent_size(self) -> int:
        """Latents along one side."""
        return self.image_size // self.downsampling


# Two CPU cores with bfloat16 instructions, under three hours.
SMALL = Setting(
    name="small",
    image_size=64,
    slugs=tuple(SMALL_OBJECTS),
    warmup_images=12_800,
    latent_channels=4,
    autoencoder_channels=(32, 64, 128),
    autoencoder_groups=4,
    autoencoder_crop=32,
    autoencoder_images=160_000,
    autoencoder_batch=64,
    autoencoder_rate=2e-3,
    vocabulary_size=2048,
    max_tokens=32,
    text_width=192,
    text_layers=3,
    denoiser_channels=(96, 192),
    denoiser_layers=1,
    denoiser_heads=4,
    denoiser_groups=8,
    denoiser_images=640_000,
    denoiser_batch=64,
    denoiser_rate=7e-4,
    pool_images=98_304,
)

# One data-centre GPU, under 25 minutes.
BASE = replace(
    SMALL,
    name="base",
    image_size=128,
    slugs=tuple(BASE_OBJECTS),
    warmup_images=51_200,
    latent_channels=8,
    autoencoder_channels=(32, 64, 96, 128),
    autoencoder_crop=64,
    autoencoder_images=1_500_000,
    autoencoder_batch=128,
    denoiser_layers=2,
    denoiser_images=6_000_000,
    denoiser_batch=512,
    denoiser_rate=1e-3,
    pool_images=393_216,
)

# Every part of the recipe in minutes; its model draws blots. A test of the recipe.
TOY = replace(
    SMALL,
    name="toy",
    slugs=tuple(SMALL_OBJECTS)[:6],
    autoencoder_channels=(16, 32, 32),
    autoencoder_groups=2,
    autoencoder_images=4_096,
    text_width=64,
    text_layers=1,
    denoiser_channels=(32, 64),
    denoiser_groups=4,
    denoiser_images=8_192,
    pool_images=2_048,
    warmup_images=1_280,
)

SETTINGS = {setting.name: setting for setting in (SMALL, BASE, TOY)}
