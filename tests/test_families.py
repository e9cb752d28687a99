"""Stable Diffusion XL from a diffusers folder to an image, against its own pipelines."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from torch import Tensor

from engine.bundle import Bundle, ComponentSpec, Manifest, TensorSpec
from engine.concepts import Concept
from engine.errors import BundleError, ConceptMismatch
from engine.families import added_input_names, time_ids
from engine.pipeline import ImageInFlight, Pipeline
from engine.requests import GenerationRequest
from tests import families
from tests.families import MIN_PSNR_DB, TEMPLATES, draw, grow, random_vectors
from tests.tiny_model import XL_DIMS, XL_POOLED_DIM, make_tiny_model, make_tiny_xl_model
from trainer.diffusion_loss import diffusion_loss
from trainer.export import BuildReport, build_bundle
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel, ModelError, load_model
from trainer.objective import Objective
from trainer.parity import diffusers_pipeline, draw_with_diffusers, load_concept, psnr_db
from trainer.sampling import sample_images
from trainer.splicing import TemplatePrompts, as_concept
from trainer.text_encoder import PromptEncoder

# Fixtures.
model, report, pipeline = families.model, families.report, families.pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its encoders say `eos_token_id` 2, as the second one of SDXL does."""
    path = tmp_path_factory.mktemp("models") / "xl"
    return make_tiny_xl_model(path, sd1_eos_token_id=True)


@pytest.fixture(scope="module")
def concept(model: DiffusionModel) -> Concept:
    return as_concept(model, random_vectors(model, 2), placeholder_token="<new>")


# Both text encoders


def test_prompts_are_encoded_as_the_pipeline_encodes_them(
    pipeline: Pipeline, model: DiffusionModel, concept: Concept
) -> None:
    plan = pipeline.plan(
        GenerationRequest(
            prompt="a photo of <new>",
            negative_prompt="red",
            concepts=(concept,),
            width=24,
            num_inference_steps=2,
        )
    )
    found, found_pooled = pipeline._encode(plan.task)
    reference = diffusers_pipeline(model)
    load_concept(reference, model, concept)
    with torch.no_grad():
        positive, negative, pooled, negative_pooled = reference.encode_prompt(
            "a photo of <new>", negative_prompt="red"
        )
    assert found.shape == (2, 20, sum(XL_DIMS)) and found_pooled.shape == (2, XL_POOLED_DIM)
    # float32 through two layers in two runtimes.
    np.testing.assert_allclose(found, torch.cat([negative, positive]).numpy(), atol=1e-5)
    np.testing.assert_allclose(
        found_pooled, torch.cat([negative_pooled, pooled]).numpy(), atol=1e-5
    )


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_gradient_is_that_of_rows_added_to_both_vocabularies(
    folder: Path, num_vectors: int
) -> None:
    """Against transformers as trainers use it: new tokens, resized tables, ids as input."""
    model = load_model(folder)
    pixels = torch.rand((2, 3, 24, 24), generator=torch.Generator().manual_seed(1)) * 2 - 1
    prompts = TemplatePrompts.lay_out(model, TEMPLATES, num_vectors)
    objective = Objective.of(model, LatentDistribution.encode(model, pixels), prompts)
    batch = objective.draw(4, torch.Generator().manual_seed(3))
    vectors = random_vectors(model, num_vectors)
    loss, gradient = objective.loss_and_gradient(vectors, batch)

    names = [f"<new{index}>" for index in range(num_vectors)]
    texts = [TEMPLATES[index].format(" ".join(names)) for index in batch.templates]
    hidden: list[Tensor] = []
    tables: list[Tensor] = []
    pooled = torch.zeros(0)
    for encoder, part in zip(model.encoders, vectors.split(model.dims, dim=1), strict=True):
        tokenizer, text_encoder = encoder.tokenizer, encoder.text_encoder
        core: Any = getattr(text_encoder, "text_model", text_encoder)
        core.eos_token_id = tokenizer.eos_token_id
        tables.append(grow(text_encoder, tokenizer, names, part))
        ids = tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt").input_ids
        outputs: Any = text_encoder(ids, output_hidden_states=True)
        hidden.append(outputs.hidden_states[-2])
        pooled = outputs[0]
    expected = diffusion_loss(
        model.unet,
        objective.schedule,
        latents=batch.latents,
        noise=batch.noise,
        timesteps=batch.timesteps,
        prompt_embeds=torch.cat(hidden, dim=-1),
        added_inputs={
            "text_embeds": pooled,
            "time_ids": torch.tensor([[24.0, 24.0, 0.0, 0.0, 24.0, 24.0]] * 4),
        },
    ).mean()
    expected.backward()
    # Two implementations of the same attention mask and of float32 sums.
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for table, part in zip(tables, gradient.split(model.dims, dim=1), strict=True):
        assert table.grad is not None
        wanted = table.grad[-num_vectors:]
        scale = wanted.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-5 * scale)


def test_the_prompt_encoder_pads_with_each_tokenizers_own_token(model: DiffusionModel) -> None:
    prompts = TemplatePrompts.lay_out(model, ["a photo of {}"], 1)
    vectors = random_vectors(model, 1).split(model.dims, dim=1)
    spliced = [
        one.splice(part, torch.tensor([0]))
        for one, part in zip(prompts.of_encoders, vectors, strict=True)
    ]
    for encoder, embeds in zip(model.encoders, spliced, strict=True):
        pad: Any = encoder.tokenizer.pad_token_id
        torch.testing.assert_close(embeds[0, -1], encoder.token_embedding[pad])
    pads = [encoder.tokenizer.pad_token for encoder in model.encoders]
    assert pads == ["<|endoftext|>", "!"]
    embeds, pooled = PromptEncoder.of(model)(
        spliced, [one.eos_index for one in prompts.of_encoders]
    )
    assert embeds.shape == (1, 20, sum(XL_DIMS)) and pooled.shape == (1, XL_POOLED_DIM)


# The bundle and its images


def test_the_manifest_says_what_the_denoiser_takes(report: BuildReport) -> None:
    manifest = report.manifest
    denoiser = {t.name: (t.dtype, t.shape) for t in manifest.components["denoiser"].inputs}
    assert denoiser == {
        "latents": ("float32", ["rows", 4, "height", "width"]),
        "timestep": ("float32", ["rows"]),
        "prompt_embeds": ("float32", ["rows", "tokens", sum(XL_DIMS)]),
        "text_embeds": ("float32", ["rows", XL_POOLED_DIM]),
        "time_ids": ("float32", ["rows", 6]),
    }
    assert manifest.family == "stable-diffusion-xl" and manifest.zero_empty_negative
    assert manifest.text_2 is not None
    assert (manifest.text.dim, manifest.text_2.dim) == XL_DIMS
    assert manifest.text_2.pad_token_id == 0 != manifest.text.pad_token_id
    assert report.parity is not None
    assert {"text_encoder", "text_encoder_2"} < report.parity.max_relative_error.keys()


@pytest.mark.parametrize("negative_prompt", ["", "a drawing"])
def test_the_runtime_draws_what_diffusers_draws(
    pipeline: Pipeline, model: DiffusionModel, concept: Concept, negative_prompt: str
) -> None:
    request = GenerationRequest(
        prompt="the red <new> in a photo",
        negative_prompt=negative_prompt,
        concepts=(concept,),
        width=32,
        height=40,
        seed=11,
        num_inference_steps=5,
        guidance_scale=6.0,
    )
    image = draw(pipeline, request)
    assert psnr_db(image, draw_with_diffusers(model, request)) > MIN_PSNR_DB
    for vectors in ("learned_embeddings", "learned_embeddings_2"):
        other = dataclasses.replace(concept, **{vectors: -getattr(concept, vectors)})
        changed = dataclasses.replace(request, concepts=(other,))
        # Each encoder is heard.
        assert psnr_db(image, draw(pipeline, changed)) < MIN_PSNR_DB - 5


def test_image_to_image_is_that_of_diffusers(
    pipeline: Pipeline, model: DiffusionModel, concept: Concept
) -> None:
    picture = np.random.default_rng(2).integers(0, 256, (24, 32, 3), np.uint8)
    request = GenerationRequest(
        prompt="a <new>",
        concepts=(concept,),
        seed=3,
        num_inference_steps=8,
        guidance_scale=3.0,
        init_image=picture,
        strength=0.6,
    )
    text_to_image = diffusers_pipeline(model)
    load_concept(text_to_image, model, concept)
    make_pipeline: Any = StableDiffusionXLImg2ImgPipeline
    reference = make_pipeline(**text_to_image.components, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        request.prompt,
        image=Image.fromarray(picture),
        strength=request.strength,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).images[0]
    assert psnr_db(draw(pipeline, request), expected) > MIN_PSNR_DB


def test_images_of_one_call_keep_their_own_conditioning(
    pipeline: Pipeline, concept: Concept
) -> None:
    requests = [
        GenerationRequest(prompt=prompt, concepts=(concept,), num_inference_steps=2, seed=1)
        for prompt in ("a <new>", "red")
    ]
    together = [pipeline.begin(pipeline.plan(request))[0] for request in requests]
    for _ in range(2):
        pipeline.step(together)
    for request, image in zip(requests, together, strict=True):
        alone = pipeline.begin(pipeline.plan(request))
        for _ in range(2):
            pipeline.step(alone)
        # float32 sums in another order.
        np.testing.assert_allclose(image.latents, alone[0].latents, rtol=0, atol=1e-4)


def test_size_is_part_of_the_conditioning(pipeline: Pipeline) -> None:
    assert time_ids(32, 40) == (40.0, 32.0, 0.0, 0.0, 40.0, 32.0)
    request = GenerationRequest(prompt="red", width=32, height=40, num_inference_steps=1)
    image: ImageInFlight = pipeline.begin(pipeline.plan(request))[0]
    assert image.added_inputs["time_ids"].tolist() == [[40.0, 32.0, 0.0, 0.0, 40.0, 32.0]] * 2
    before = image.latents
    pipeline.step([image])
    other = pipeline.begin(pipeline.plan(request))[0]
    other.added_inputs["time_ids"] = other.added_inputs["time_ids"] * 10
    np.testing.assert_array_equal(other.latents, before)
    pipeline.step([other])
    assert np.abs(other.latents - image.latents).max() > 1e-4


def test_samples_while_learning_are_those_of_diffusers(
    model: DiffusionModel, concept: Concept
) -> None:
    (sample,) = sample_images(
        model, [concept], ["a <new>"], size=24, seed=7, num_inference_steps=3, guidance_scale=4.0
    )
    request = GenerationRequest(
        prompt="a <new>",
        concepts=(concept,),
        width=24,
        height=24,
        seed=7,
        num_inference_steps=3,
        guidance_scale=4.0,
    )
    assert psnr_db(np.asarray(sample) / 255.0, draw_with_diffusers(model, request)) > MIN_PSNR_DB


# What is refused


def test_concepts_of_other_models_are_refused(pipeline: Pipeline, concept: Concept) -> None:
    one = dataclasses.replace(concept, learned_embeddings_2=None)
    swapped = Concept(
        placeholder_token="<new>",
        learned_embeddings=concept.encoders[1],
        learned_embeddings_2=concept.encoders[0],
    )
    for other in (one, swapped):
        request = GenerationRequest(prompt="<new>", concepts=(other,), num_inference_steps=2)
        with pytest.raises(ConceptMismatch, match="width .*use a concept learned on this model"):
            pipeline.plan(request)


def test_an_input_that_nobody_can_fill_is_refused(report: BuildReport) -> None:
    denoiser = report.manifest.components["denoiser"]
    extra = TensorSpec(name="image_embeds", dtype="float32", shape=["rows", 8])
    changed = ComponentSpec(
        file=denoiser.file, inputs=[*denoiser.inputs, extra], outputs=denoiser.outputs
    )
    components = {**report.manifest.components, "denoiser": changed}
    manifest = dataclasses.replace(report.manifest, components=components)
    with pytest.raises(BundleError, match="takes image_embeds, this version can fill text_embeds"):
        added_input_names(manifest)


def test_a_bundle_without_its_second_encoder_is_refused(
    report: BuildReport, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(report.path, tmp_path / "bundle"))
    manifest: Manifest = report.manifest
    files = {name: digest for name, digest in manifest.files.items() if "_2" not in name}
    components = {k: v for k, v in manifest.components.items() if k != "text_encoder_2"}
    changed = dataclasses.replace(manifest, files=files, components=components)
    (bundle / "bundle.json").write_text(changed.to_json())
    with pytest.raises(
        BundleError, match=r"not list text_encoder_2, token_embedding_2\.saf.*, tokenizer_2\.json"
    ):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "text_encoder is missing.*supported"),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "text_encoder_2 CLIPTextModel",
        ),
        (
            "model_index.json",
            {"transformer": ["diffusers", "SD3Transformer2DModel"]},
            "transformer SD3",
        ),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type=None"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ("tokenizer_2/tokenizer.json", None, "cannot read the tokenizer_2"),
        ("text_encoder_2/model.safetensors", None, "the weights of text_encoder_2"),
    ],
)
def test_models_that_are_no_sdxl_are_refused_by_what_they_have(
    folder: Path, tmp_path: Path, file: str, changes: dict[str, Any] | None, message: str
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "model")) / file
    if changes is None:
        path.write_bytes(b"{")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "model")


def test_the_pipeline_is_told_whether_empty_prompts_are_zeros(tmp_path: Path) -> None:
    model = load_model(make_tiny_xl_model(tmp_path, force_zeros=False))
    assert not model.zero_empty_negative
    assert not diffusers_pipeline(model).config.force_zeros_for_empty_prompt


# Stable Diffusion 2.x


def test_v_prediction_with_an_exact_gelu_passes_the_gate(tmp_path: Path) -> None:
    """As Stable Diffusion 2.x: OpenCLIP's activation; its last layer is left out of the files."""
    path = make_tiny_model(tmp_path / "v", prediction_type="v_prediction", hidden_act="gelu")
    report = build_bundle(path, tmp_path / "bundle", samplers=["ddim"], max_steps=8)
    assert report.manifest.prediction_type == "v_prediction" and report.manifest.text_2 is None
    assert report.parity is not None and report.parity.image_psnr_db > MIN_PSNR_DB
