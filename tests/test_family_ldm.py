"""The model of the Textual Inversion paper, latent diffusion with LDMBert, against diffusers."""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMTextToImagePipeline
from PIL import Image
from torch import Tensor

from engine.bundle import Bundle
from engine.concepts import Concept, read_concept
from engine.errors import ConceptMismatch, UnknownConcept
from engine.pipeline import Pipeline
from engine.prompts import PromptReader
from engine.requests import GenerationRequest
from tests import families
from tests.families import MIN_PSNR_DB, TEMPLATES, draw, grow, random_vectors
from tests.tiny_model import LDM_DIM, make_tiny_ldm_model
from trainer import cli
from trainer.diffusion_loss import diffusion_loss
from trainer.encoder_modules import LdmBertTextEncoder
from trainer.export import BuildReport, build_bundle
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel, ModelError, load_model
from trainer.objective import Objective
from trainer.onnx_graphs import ExportError
from trainer.parity import diffusers_pipeline, draw_with_diffusers, psnr_db
from trainer.sampling import sample_images
from trainer.splicing import TemplatePrompts, as_concept, plain_tokenizer, text_spec

MAX_TOKENS = 77
# float32 through two layers in two runtimes.
ATOL = 1e-5

# Fixtures.
model, report, pipeline = families.model, families.report, families.pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_ldm_model(tmp_path_factory.mktemp("models") / "ldm")


@pytest.fixture(scope="module")
def concept(model: DiffusionModel) -> Concept:
    return as_concept(model, random_vectors(model, 2), placeholder_token="<Cat-Toy>")


@pytest.fixture(scope="module")
def reader(model: DiffusionModel) -> PromptReader:
    return PromptReader(
        plain_tokenizer(model), model.token_embedding.numpy(), text_spec(model), max_chunks=1
    )


class NegativeTokenizer:
    """Hands out another text where the pipeline asks for its unconditional prompt, ""."""

    def __init__(self, tokenizer: Any, negative_prompt: str) -> None:
        self.tokenizer = tokenizer
        self.negative_prompt = negative_prompt

    def __call__(self, texts: list[str] | str, **options: Any) -> Any:
        return self.tokenizer([self.negative_prompt] if texts == [""] else texts, **options)


def reference_of(folder: Path, concept: Concept, names: list[str], negative_prompt: str) -> Any:
    """diffusers' own pipeline, nothing of ours, whose vocabulary has the vectors by these names."""
    loaded: Any = LDMTextToImagePipeline.from_pretrained(folder)
    grow(loaded.bert, loaded.tokenizer, names, torch.from_numpy(concept.learned_embeddings.copy()))
    parts = {**loaded.components, "tokenizer": NegativeTokenizer(loaded.tokenizer, negative_prompt)}
    make_pipeline: Any = LDMTextToImagePipeline
    reference = make_pipeline(**parts)
    reference.set_progress_bar_config(disable=True)
    return reference


def ids_of(tokenizer: Any, texts: list[str] | str) -> Tensor:
    """As `LDMTextToImagePipeline.__call__` tokenizes."""
    options: dict[str, Any] = {"padding": "max_length", "max_length": 77, "truncation": True}
    return tokenizer(texts, **options, return_tensors="pt").input_ids


# The text encoder


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_spliced_vectors_equal_a_vocabulary_that_has_grown(folder: Path, num_vectors: int) -> None:
    model = load_model(folder)
    vectors = random_vectors(model, num_vectors)
    names = [f"<new{index}>" for index in range(num_vectors)]
    table = torch.cat([model.token_embedding, vectors])
    bert: Any = model.text_encoder
    encoder = LdmBertTextEncoder(bert)
    grow(bert, model.tokenizer, names, vectors)
    ids = ids_of(model.tokenizer, [f"a {' '.join(names)} in the morning", "the red cat", ""])
    eos_index = torch.eq(ids, model.encoders[0].eos_token_id).int().argmax(-1)
    prompt_embeds, pooled = encoder(table[ids], eos_index)
    expected = bert(ids)[0]
    torch.testing.assert_close(prompt_embeds, expected, rtol=0.0, atol=ATOL)
    assert eos_index.tolist() == [5 + num_vectors, 4, 1]
    torch.testing.assert_close(pooled, expected[torch.arange(3), eos_index], rtol=0.0, atol=ATOL)


def test_padding_is_attended_to_as_the_pipeline_has_it(model: DiffusionModel) -> None:
    tokenizer, bert = model.tokenizer, model.text_encoder
    encoded: Any = tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt")
    embeds = model.token_embedding[encoded.input_ids]
    found, _ = model.encoders[0].module()(embeds, torch.tensor([3]))
    without_mask = bert(encoded.input_ids)[0]
    with_mask = bert(encoded.input_ids, attention_mask=encoded.attention_mask)[0]
    torch.testing.assert_close(found, without_mask, rtol=0.0, atol=ATOL)
    # A hundred times the tolerance: a mask would be seen.
    assert (with_mask - without_mask)[0, :4].abs().max() > 100 * ATOL


def test_words_see_those_after_them(model: DiffusionModel) -> None:
    ids = ids_of(model.tokenizer, ["a red cat", "a red dog"])
    embeds, _ = model.encoders[0].module()(model.token_embedding[ids], torch.tensor([4, 4]))
    assert (embeds[0, :3] - embeds[1, :3]).abs().max() > 100 * ATOL


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_gradient_is_that_of_rows_added_to_the_vocabulary(folder: Path, num_vectors: int) -> None:
    """Against the original way to learn: new tokens, a larger table, ids as input."""
    model = load_model(folder)
    pixels = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    prompts = TemplatePrompts.lay_out(model, TEMPLATES, num_vectors)
    objective = Objective.of(model, LatentDistribution.encode(model, pixels), prompts)
    batch = objective.draw(4, torch.Generator().manual_seed(3))
    vectors = random_vectors(model, num_vectors)
    loss, gradient = objective.loss_and_gradient(vectors, batch)

    names = [f"<new{index}>" for index in range(num_vectors)]
    texts = [TEMPLATES[index].format(" ".join(names)) for index in batch.templates]
    table = grow(model.text_encoder, model.tokenizer, names, vectors)
    expected = diffusion_loss(
        model.unet,
        objective.schedule,
        latents=batch.latents,
        noise=batch.noise,
        timesteps=batch.timesteps,
        prompt_embeds=model.text_encoder(ids_of(model.tokenizer, texts))[0],
    ).mean()
    expected.backward()
    # float32 sums in another order.
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert table.grad is not None
    wanted = table.grad[-num_vectors:]
    scale = wanted.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * scale)


# Prompts


@pytest.mark.parametrize("text", ["", "a photo of the red cat", "A Photo of the RED Café, ok!"])
def test_text_becomes_the_tokens_that_the_pipeline_makes_of_it(
    model: DiffusionModel, reader: PromptReader, text: str
) -> None:
    assert reader.read(text).input_ids.tolist() == ids_of(model.tokenizer, [text]).tolist()


@pytest.mark.parametrize("text", [r"a \[cat\] \(red\)", r"a \[SEP\] cat", r"red \<dog\>"])
def test_escaped_syntax_is_text(model: DiffusionModel, reader: PromptReader, text: str) -> None:
    plain = text.replace("\\", "")
    assert reader.read(text).input_ids.tolist() == ids_of(model.tokenizer, [plain]).tolist()


def test_brackets_weigh_words_and_are_no_special_tokens(reader: PromptReader) -> None:
    read = reader.read("[SEP] (cat:1.5)")
    plain = reader.read("sep cat")
    np.testing.assert_array_equal(read.input_ids, plain.input_ids)
    # "s", "##e", "##p" weigh 1 / 1.1, the cat 1.5; [CLS], [SEP] and padding nothing else than 1.
    expected = [1.0, *[1 / 1.1] * 3, 1.5, *[1.0] * (MAX_TOKENS - 5)]
    np.testing.assert_allclose(read.weights[0], expected, rtol=1e-6)


def test_words_are_lower_cased_and_placeholders_are_not(
    reader: PromptReader, concept: Concept
) -> None:
    read = reader.read("A Photo of <Cat-Toy>, in the morning", [concept])
    plain = reader.read("a photo of , in the morning")
    assert read.slots == ((0, 4, "<Cat-Toy>"),)
    np.testing.assert_array_equal(read.inputs_embeds[0, 4:6], concept.learned_embeddings)
    ends = [4, 6]  # the vectors stand where nothing does in the plain text
    np.testing.assert_array_equal(
        np.delete(read.input_ids[0], ends[0] + np.arange(2)), plain.input_ids[0, :-2]
    )
    with pytest.raises(UnknownConcept, match="'<cat-toy>'.*<Cat-Toy>"):
        reader.read("a <cat-toy>", [concept])


def test_a_prompt_begins_with_cls_ends_with_sep_and_is_padded_with_pad(
    report: BuildReport, model: DiffusionModel
) -> None:
    text, tokenizer = report.manifest.text, model.tokenizer
    found = (text.bos_token_id, text.eos_token_id, text.pad_token_id)
    wanted = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "[PAD]"])
    assert [*found] == wanted
    assert (text.max_tokens, text.dim, text.output_dim) == (MAX_TOKENS, LDM_DIM, LDM_DIM)


# The bundle and its images


def test_the_bundle_has_the_parts_of_any_other(report: BuildReport) -> None:
    manifest = report.manifest
    assert manifest.family == "latent-diffusion" and manifest.text_2 is None
    assert {*manifest.components} == {"text_encoder", "denoiser", "vae_decoder", "vae_encoder"}
    inputs = {t.name: t.shape for t in manifest.components["text_encoder"].inputs}
    assert inputs == {"inputs_embeds": ["batch", MAX_TOKENS, LDM_DIM], "eos_index": ["batch"]}
    assert (manifest.latents.scale_factor, manifest.latents.default_size) == (8, 64)
    assert report.parity is not None and report.parity.image_psnr_db > MIN_PSNR_DB


def test_prompts_are_encoded_as_the_pipeline_encodes_them(
    pipeline: Pipeline, folder: Path, concept: Concept
) -> None:
    plan = pipeline.plan(
        GenerationRequest(prompt="a photo of <Cat-Toy>", concepts=(concept,), num_inference_steps=2)
    )
    found, _ = pipeline._encode(plan.task)
    reference = reference_of(folder, concept, ["<one>", "<two>"], "")
    ids = ids_of(reference.tokenizer.tokenizer, ["", "a photo of <one> <two>"])
    with torch.no_grad():
        expected = reference.bert(ids)[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("guidance_scale", "negative_prompt"), [(1.0, ""), (5.0, ""), (5.0, "a red drawing")]
)
def test_the_runtime_draws_what_diffusers_draws(
    pipeline: Pipeline, folder: Path, concept: Concept, guidance_scale: float, negative_prompt: str
) -> None:
    vectors = concept.learned_embeddings
    request = GenerationRequest(
        prompt="The red <Cat-Toy> in a photo",
        negative_prompt=negative_prompt,
        concepts=(concept,),
        width=64,
        height=96,
        seed=11,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
    )
    reference = reference_of(folder, concept, ["<one>", "<two>"], negative_prompt)
    latents = torch.randn((1, 4, 12, 8), generator=torch.Generator().manual_seed(request.seed))
    expected = reference(
        request.prompt.replace("<Cat-Toy>", "<one> <two>"),
        width=request.width,
        height=request.height,
        latents=latents,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=guidance_scale,
        eta=0.0,
        output_type="np",
    ).images[0]
    image = draw(pipeline, request)
    assert psnr_db(image, expected) > MIN_PSNR_DB
    # Every word is heard, and more than rounding is.
    others = [replace(request, prompt="A <Cat-Toy> and a dog")]
    others.append(replace(request, concepts=(replace(concept, learned_embeddings=-vectors),)))
    if negative_prompt:
        others.append(replace(request, negative_prompt="a red photo"))
    for other in others:
        assert psnr_db(draw(pipeline, other), expected) < MIN_PSNR_DB - 5


def test_half_precision_passes_the_gate(folder: Path, tmp_path: Path) -> None:
    report = build_bundle(
        folder, tmp_path / "half", precision="fp16", samplers=["ddim"], max_steps=4
    )
    inputs = Bundle.open(report.path).manifest.components["text_encoder"].inputs
    assert {tensor.name: tensor.dtype for tensor in inputs} == {
        "inputs_embeds": "float16",
        "eos_index": "int64",
    }


# Learning


def test_samples_while_learning_are_those_of_diffusers(
    model: DiffusionModel,
) -> None:
    concept = as_concept(model, random_vectors(model, 2), placeholder_token="<new>")
    options: dict[str, Any] = {"seed": 7, "num_inference_steps": 3, "guidance_scale": 4.0}
    (sample,) = sample_images(model, [concept], ["a <new>"], size=64, **options)
    request = GenerationRequest(
        prompt="a <new>", concepts=(concept,), width=64, height=64, **options
    )
    assert psnr_db(np.asarray(sample) / 255.0, draw_with_diffusers(model, request)) > MIN_PSNR_DB


def test_a_word_is_learned_from_pictures_and_drawn(
    folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(2):
        levels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(levels).save(pictures / f"{seed}.png")
    output = tmp_path / "toy.safetensors"
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    options = {
        "--model": folder,
        "--output": output,
        "--placeholder-token": "<Cat-Toy>",
        "--initializer-token": "cat",
        "--num-vectors": 2,
        "--learning-rate": 0.1,
        "--steps": 4,
        "--eval-every": 2,
        "--batch-size": 2,
        "--device": "cpu",
    }
    words = [str(word) for option in options.items() for word in option]
    assert cli.run(parser.parse_args([str(pictures), *words])) == 0
    concept = read_concept(output)
    assert concept.learned_embeddings.shape == (2, LDM_DIM)
    request = GenerationRequest(
        prompt="a <Cat-Toy>", concepts=(concept,), num_inference_steps=2, seed=1
    )
    cat = GenerationRequest(prompt="a cat", num_inference_steps=2, seed=1)
    assert psnr_db(draw(pipeline, request), draw(pipeline, cat)) < MIN_PSNR_DB


# Models as they are on the hub, and what is refused


def test_files_as_the_first_diffusers_wrote_them_are_read(
    folder: Path, tmp_path: Path, reader: PromptReader
) -> None:
    """A vocabulary instead of a whole tokenizer, and keys that no scheduler has any more."""
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    tokenizer = path / "tokenizer"
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    (tokenizer / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    edit_json(path / "scheduler" / "scheduler_config.json", {"timestep_values": None})
    edit_json(path / "vqvae" / "config.json", {"scaling_factor": None})
    model = load_model(path)
    text = "A Photo of the red cat"
    assert ids_of(model.tokenizer, [text]).tolist() == reader.read(text).input_ids.tolist()
    assert model.scaling_factor == 0.18215


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a JSON object; None takes one away."""
    edited = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in edited.items() if v is not None}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "vqvae VQModel: .* mean and"),
        ("model_index.json", {"vqvae": None}, "vqvae is missing"),
        ("model_index.json", {"bert": ["transformers", "BertModel"]}, "bert BertModel"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "unet UNet2DModel"),
        ("unet/config.json", {"in_channels": 8}, "takes 8 channels and gives 4.*latents have 4"),
    ],
)
def test_other_latent_diffusion_models_are_refused_by_what_they_have(
    folder: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    edit_json(path / file, changes)
    with pytest.raises(ModelError, match=rf"{message}.*supported: "):
        load_model(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 40}, "max_tokens is 40, .* has 77 built in.*that has 77"),
        ({"vae_channels": (8, 8)}, "scale_factor is 2, .* has 8 built in.*that has 8"),
    ],
)
def test_sizes_that_the_pipeline_does_not_know_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(make_tiny_ldm_model(tmp_path / "model", **options))


def test_a_scheduler_that_clips_is_refused_before_anything_is_built(
    folder: Path, tmp_path: Path
) -> None:
    """`StableDiffusionPipeline` turns clipping off; this one leaves it, and the gate would fail."""
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    edit_json(path / "scheduler" / "scheduler_config.json", {"clip_sample": True})
    with pytest.raises(ExportError, match="clip_sample true.*set clip_sample to false in sched"):
        build_bundle(path, tmp_path / "bundle", samplers=["ddim"], max_steps=8)
    assert not (tmp_path / "bundle").exists()


def test_pickled_weights_are_refused_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    (path / "bert" / "model.safetensors").rename(path / "bert" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights of bert.*only .safetensors.*save_pretrained"):
        load_model(path)


def test_the_reference_refuses_a_negative_prompt_that_it_would_ignore(
    model: DiffusionModel,
) -> None:
    with pytest.raises(ValueError, match="is 'red', LDMTextToImagePipeline always takes the empty"):
        diffusers_pipeline(model)("a cat", negative_prompt="red")


def test_a_concept_of_another_family_is_refused(pipeline: Pipeline) -> None:
    other = Concept(placeholder_token="<new>", learned_embeddings=np.zeros((1, 1280), np.float32))
    request = GenerationRequest(prompt="<new>", concepts=(other,), num_inference_steps=2)
    with pytest.raises(ConceptMismatch, match=r"width 1280 \(as latent diffusion\), .* wants 20"):
        pipeline.plan(request)
