"""Manifests of no bundle, for tests of what is decided from a manifest alone."""

from engine.bundle import LatentSpec, Manifest, TextSpec


def sd15_manifest() -> Manifest:
    """Stable Diffusion 1.5's sizes, without components."""
    return Manifest(
        format_version=1,
        family="stable-diffusion",
        model_name="sd",
        precision="fp16",
        prediction_type="epsilon",
        scheduler_config={},
        text=TextSpec(
            max_tokens=77,
            dim=768,
            output_dim=768,
            vocab_size=49408,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
            embedding_fingerprint="",
        ),
        latents=LatentSpec(
            channels=4,
            scale_factor=8,
            size_multiple=64,
            default_size=512,
            scaling_factor=0.18215,
            shift_factor=0.0,
        ),
        components={},
        files={},
        build_key="key",
    )
