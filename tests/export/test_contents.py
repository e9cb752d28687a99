"""What is in a bundle, and that it draws what diffusers draws."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from engine.bundle import COMPONENTS, Bundle
from engine.concepts import Concept
from engine.fingerprint import embedding_fingerprint
from engine.pipeline import Pipeline, sound
from engine.requests import GenerationRequest
from tests.export_setup import build
from trainer.export import BuildReport
from trainer.model import load_model
from trainer.parity import draw_with_diffusers, psnr_db


def test_every_axis_of_a_request_is_dynamic(report: BuildReport) -> None:
    inputs = {
        name: {tensor.name: (tensor.dtype, tensor.shape) for tensor in spec.inputs}
        for name, spec in report.manifest.components.items()
    }
    assert inputs == {
        "text_encoder": {
            "inputs_embeds": ("float32", ["batch", 20, 24]),
            "eos_index": ("int64", ["batch"]),
        },
        "denoiser": {
            "latents": ("float32", ["rows", 4, "height", "width"]),
            "timestep": ("float32", ["rows"]),
            "prompt_embeds": ("float32", ["rows", "tokens", 24]),
        },
        "vae_decoder": {"latents": ("float32", ["batch", 4, "height", "width"])},
        "vae_encoder": {"images": ("float32", ["batch", 3, "height", "width"])},
    }


def test_the_manifest_says_what_the_model_is(report: BuildReport, tiny_model: Path) -> None:
    manifest, model = report.manifest, load_model(tiny_model)
    assert (manifest.model_name, manifest.prediction_type) == ("tiny", "epsilon")
    assert (manifest.text.max_tokens, manifest.text.dim) == (20, 24)
    latents = manifest.latents
    # Two pixels a latent, two halvings in the UNet: 8; trained at 12 latents: 24 pixels.
    assert (latents.scale_factor, latents.size_multiple, latents.default_size) == (2, 8, 24)
    assert latents.scaling_factor == 0.3
    table = load_file(report.path / "token_embedding.safetensors")["token_embedding"]
    np.testing.assert_array_equal(table, model.token_embedding.numpy())
    little_endian = table.astype("<f4").tobytes(order="C")
    assert manifest.text.embedding_fingerprint == hashlib.sha256(little_endian).hexdigest()
    assert manifest.text.embedding_fingerprint == embedding_fingerprint(table.astype(">f4"))


def test_the_tokenizer_neither_cuts_nor_pads(report: BuildReport, tiny_model: Path) -> None:
    tokenizer = Bundle.open(report.path).tokenizer
    reference = load_model(tiny_model).tokenizer
    text = "A photo of dogs, in the morning; " * 4
    expected = reference(text, add_special_tokens=False, truncation=False).input_ids
    assert len(expected) > 20
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert tokenizer.encode("", add_special_tokens=False).ids == []


def test_the_runtime_draws_what_diffusers_draws(report: BuildReport, tiny_model: Path) -> None:
    model = load_model(tiny_model)
    rng = np.random.default_rng(3)
    concept = Concept(
        placeholder_token="<new>",
        # As long as the table's own rows times 30: a tiny random encoder hears no less.
        learned_embeddings=rng.standard_normal((3, 24)).astype(np.float32) * 0.6,
    )
    request = GenerationRequest(
        prompt="the red <new> in a photo",
        concepts=(concept,),
        width=32,
        height=40,
        seed=11,
        num_inference_steps=5,
        guidance_scale=6.0,
    )
    pipeline = Pipeline.open(report.path)
    images = pipeline.begin(pipeline.plan(request))
    while not images[0].is_done:
        pipeline.step(images)
    image = sound(pipeline.decode(images))[0] / 255.0
    # Rounding to 8 bits alone gives 58.9 dB; the rest is float32 in another order.
    assert psnr_db(image, draw_with_diffusers(model, request)) > 55
    other = Concept(placeholder_token="<new>", learned_embeddings=-concept.learned_embeddings)
    changed = dataclasses.replace(request, concepts=(other,))
    assert psnr_db(image, draw_with_diffusers(model, changed)) < 45


def test_parity_is_on_record(report: BuildReport) -> None:
    recorded = json.loads((report.path / "parity.json").read_text())
    assert report.parity is not None and set(recorded["max_relative_error"]) == set(COMPONENTS)
    assert recorded["image_psnr_db"] == report.parity.image_psnr_db
    for component, errors in recorded["max_relative_error"].items():
        # Never exactly equal: equality would mean that nothing was compared.
        assert 0 < max(errors.values()) < recorded["limits"]["max_relative_error"][component]


def test_float16_bundle_is_half_inside_and_passes_the_gate(
    tiny_model: Path, tmp_path: Path, report: BuildReport
) -> None:
    half = build(tiny_model, tmp_path / "half", precision="fp16")
    dtypes = {
        tensor.name: tensor.dtype
        for spec in half.manifest.components.values()
        for tensor in (*spec.inputs, *spec.outputs)
    }
    assert dtypes.pop("timestep") == "float32" and dtypes.pop("eos_index") == "int64"
    assert set(dtypes.values()) == {"float16"}
    assert half.parity is not None and half.parity.image_psnr_db > 50
    # Float16 is seen in the figures: they are those of the graphs, not of the reference.
    assert max(half.parity.max_relative_error["denoiser"].values()) > 1e-4
    assert half.manifest.build_key != report.manifest.build_key
