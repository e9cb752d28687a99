"""What plans are compiled for: targets, resolution buckets, profiles and their choice."""

import dataclasses
import sys
from types import ModuleType

import pytest

from engine.bundle import ComponentSpec, Manifest, TensorSpec
from engine.errors import ConfigError, ProviderUnavailable
from engine.plans.profiles import Bucket, Profile, buckets_of, choose_profile, profiles_of
from engine.plans.targets import Target
from engine.plans.tensorrt_module import import_tensorrt
from tests.manifests import sd15_manifest


@pytest.fixture
def manifest() -> Manifest:
    return sd15_manifest()


# Targets


def test_targets_are_read_in_any_order_and_case() -> None:
    target = Target.parse("RTX:SM120, sm86,sm86")
    assert target.capabilities == ("sm86", "sm120")
    assert (str(target), target.folder) == ("rtx:sm86,sm120", "rtx-sm86-sm120")
    hopper = Target.parse("trt:SM90")
    assert (str(hopper), hopper.folder, hopper.kind) == ("trt:sm90", "trt-sm90", "trt")
    assert Target.parse("trt:native").is_native and not hopper.is_native


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx:sm90", "Hopper .sm90. is not supported by TensorRT for RTX: compile trt:sm90"),
        ("rtx:sm86,sm61", "unknown compute capability sm61 .*sm75, sm80, sm86"),
        ("cuda:sm86", "unknown target 'cuda:sm86'; write rtx:SM"),
        ("rtx:", "unknown target"),
        ("trt", "unknown target"),
        ("trt:sm89,sm90", "names 2 compute capabilities; TensorRT compiles for the GPU"),
        ("trt:hopper", "'hopper' in target 'trt:hopper' is no compute capability"),
    ],
)
def test_unknown_targets_are_refused_with_the_known_ones(text: str, message: str) -> None:
    with pytest.raises(ProviderUnavailable, match=message):
        Target.parse(text)


def test_a_missing_compiler_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ProviderUnavailable, match=r"for RTX .*pip install oneword\[rtx\]"):
        import_tensorrt("rtx")
    with pytest.raises(ProviderUnavailable, match=r"pip install oneword\[tensorrt\]"):
        import_tensorrt("trt")


def test_a_compiler_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 11 precision was a flag; a module of that name and version stands in for it."""
    old = ModuleType("tensorrt")
    old.__version__ = "10.16.1"  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(ProviderUnavailable, match=r"version 10\.16\.1, needed is 11 or newer"):
        import_tensorrt("trt")


# Buckets


def test_buckets_are_read_and_written() -> None:
    texts = ("512x768", "256x256-768x512")
    assert [str(Bucket.parse(text)) for text in texts] == list(texts)
    assert Bucket.parse("512") == Bucket((512, 512), (512, 512))
    assert str(Bucket.parse("256-768")) == "256x256-768x768"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wide", "bucket 'wide' is no size; write 512x768"),
        ("768-512", "ends below its beginning"),
        ("500x512", "bucket 500x512: 500 is no multiple of 64 pixels"),
        ("0x512", "bucket 0x512: 0 is no multiple of 64"),
    ],
)
def test_buckets_that_cannot_be_are_refused(manifest: Manifest, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        buckets_of(manifest.latents, [text])


def test_the_models_own_buckets_are_its_size_and_half_to_one_and_a_half(manifest: Manifest) -> None:
    assert [str(b) for b in buckets_of(manifest.latents)] == ["512x512", "256x256-768x768"]
    odd = dataclasses.replace(manifest.latents, default_size=320)  # half of it is no multiple
    assert [str(b) for b in buckets_of(odd)] == ["320x320", "128x128-512x512"]
    chosen = buckets_of(manifest.latents, ["512x768", "512x768", "768x512"])
    assert [str(bucket) for bucket in chosen] == ["512x768", "768x512"]


# Profiles


def tensors(**shapes: list[int | str]) -> list[TensorSpec]:
    return [TensorSpec(name=n, dtype="float16", shape=shape) for n, shape in shapes.items()]


DENOISER = ComponentSpec(
    file="denoiser.onnx",
    inputs=tensors(
        latents=["rows", 4, "height", "width"],
        timestep=["rows"],
        prompt_embeds=["rows", "tokens", 768],
    ),
    outputs=[],
)


def test_the_denoiser_has_a_profile_for_each_bucket_with_dynamic_rows(manifest: Manifest) -> None:
    buckets = buckets_of(manifest.latents, ["512x768", "256-640"])
    both = {
        "timestep": ([1], [2], [16]),
        "prompt_embeds": ([1, 77, 768], [2, 77, 768], [16, 231, 768]),
    }
    assert profiles_of("denoiser", DENOISER, manifest, buckets) == [
        {"latents": ([1, 4, 96, 64], [2, 4, 96, 64], [16, 4, 96, 64]), **both},
        {"latents": ([1, 4, 32, 32], [2, 4, 64, 64], [16, 4, 80, 80]), **both},
    ]


def test_the_encoder_of_images_is_in_pixels(manifest: Manifest) -> None:
    spec = ComponentSpec(
        file="vae_encoder.onnx", inputs=tensors(images=["batch", 3, "height", "width"]), outputs=[]
    )
    exact, wide = profiles_of("vae_encoder", spec, manifest, buckets_of(manifest.latents))
    assert exact["images"] == ([1, 3, 512, 512], [1, 3, 512, 512], [4, 3, 512, 512])
    assert wide["images"] == ([1, 3, 256, 256], [1, 3, 512, 512], [4, 3, 768, 768])


def test_text_has_one_profile_whatever_the_buckets(manifest: Manifest) -> None:
    spec = ComponentSpec(
        file="text_encoder.onnx",
        inputs=tensors(inputs_embeds=["batch", 77, 768], eos_index=["batch"]),
        outputs=[],
    )
    (profile,) = profiles_of("text_encoder", spec, manifest, buckets_of(manifest.latents))
    assert profile["inputs_embeds"] == ([1, 77, 768], [2, 77, 768], [8, 77, 768])


def test_shapes_go_to_the_narrowest_profile_that_takes_them(manifest: Manifest) -> None:
    buckets = buckets_of(manifest.latents, ["256-1024", "256-768", "512x512"])
    profiles = profiles_of("denoiser", DENOISER, manifest, buckets)

    def chosen(rows: int, height: int, width: int, chunks: int = 1) -> int | None:
        shapes = {
            "latents": (rows, 4, height // 8, width // 8),
            "timestep": (rows,),
            "prompt_embeds": (rows, 77 * chunks, 768),
        }
        return choose_profile(profiles, shapes)

    assert [chosen(2, 512, 512), chosen(16, 512, 512, 3)] == [2, 2]
    assert [chosen(2, 512, 768), chosen(1, 256, 256)] == [1, 1]
    assert chosen(2, 1024, 512) == 0
    assert [chosen(2, 1088, 512), chosen(17, 512, 512), chosen(2, 512, 512, 4)] == [None] * 3
    assert choose_profile(profiles, {"latents": (1, 4, 64, 64)}) is None, "inputs are missing"
    assert choose_profile(list[Profile](), {}) is None
