"""Templates with vectors in their slots, against the engine and a vocabulary that has grown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.concepts import MAX_NUM_VECTORS, Concept
from engine.prompts import PromptReader
from tests import learning_setup
from tests.tiny_model import make_tiny_model
from trainer.diffusion_loss import diffusion_loss
from trainer.errors import LearningError
from trainer.images import TrainingImages
from trainer.latents import LatentDistribution
from trainer.model import DiffusionModel, load_model
from trainer.objective import Objective
from trainer.splicing import TemplatePrompts, plain_tokenizer, text_spec
from trainer.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, templates_for

# Fixtures.
model_path, model, own_model, images = (
    learning_setup.model_path,
    learning_setup.model,
    learning_setup.own_model,
    learning_setup.images,
)


@pytest.mark.parametrize("learnable_property", ["object", "style"])
@pytest.mark.parametrize("num_vectors", [1, 3])
def test_splice_is_that_of_the_engine(
    model: DiffusionModel, learnable_property: Any, num_vectors: int
) -> None:
    vectors = torch.randn((num_vectors, 24), generator=torch.Generator().manual_seed(0))
    templates = templates_for(learnable_property)
    prompts = TemplatePrompts.lay_out(model, templates, num_vectors)
    spliced = prompts.splice(vectors, torch.arange(len(templates)))
    concept = Concept(placeholder_token="<cat-toy>", learned_embeddings=vectors.numpy())
    table = model.token_embedding.numpy()
    reader = PromptReader(plain_tokenizer(model), table, text_spec(model))
    for row, template in enumerate(templates):
        read = reader.read(template.format("<cat-toy>"), [concept])
        np.testing.assert_array_equal(spliced[row].numpy(), read.inputs_embeds[0])
        assert prompts.eos_index[row] == read.eos_index[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("num_vectors", [1, 2])
def test_gradient_is_that_of_rows_added_to_the_vocabulary(
    own_model: DiffusionModel, images: TrainingImages, num_vectors: int
) -> None:
    """Against transformers as trainers use it: new tokens, a resized table, ids as input."""
    prompts = TemplatePrompts.lay_out(own_model, OBJECT_TEMPLATES, num_vectors)
    latents = LatentDistribution.encode(own_model, images.pixels)
    objective = Objective.of(own_model, latents, prompts)
    batch = objective.draw(4, torch.Generator().manual_seed(3))
    vectors = 0.3 * torch.randn((num_vectors, 24), generator=torch.Generator().manual_seed(0))
    loss, gradient = objective.loss_and_gradient(vectors, batch)

    tokenizer = own_model.tokenizer
    encoder: Any = own_model.text_encoder
    names = [f"<new{index}>" for index in range(num_vectors)]
    tokenizer.add_tokens(names)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-num_vectors:] = vectors
    table.requires_grad_(True)
    texts = [OBJECT_TEMPLATES[index].format(" ".join(names)) for index in batch.templates]
    ids = tokenizer(texts, padding="max_length", max_length=40, return_tensors="pt").input_ids
    expected = diffusion_loss(
        own_model.unet,
        objective.schedule,
        latents=batch.latents,
        noise=batch.noise,
        timesteps=batch.timesteps,
        prompt_embeds=encoder(ids).last_hidden_state,
    ).mean()
    expected.backward()
    assert table.grad is not None
    # Two implementations of the same attention mask and of float32 sums.
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    scale = table.grad[-num_vectors:].abs().max().item()
    assert scale > 0
    torch.testing.assert_close(gradient, table.grad[-num_vectors:], rtol=1e-5, atol=1e-5 * scale)


def test_templates_hold_one_slot_and_no_prompt_syntax() -> None:
    for templates in (OBJECT_TEMPLATES, STYLE_TEMPLATES):
        assert len(set(templates)) == len(templates)
        for template in templates:
            assert template.count("{}") == 1
            assert not set(template) & set("()[]:\\<>")


@pytest.mark.parametrize("num_vectors", [36, 38, 39, 75, 76, 1000, 10**9])
def test_more_vectors_than_room_is_an_error_with_the_limit(
    model: DiffusionModel, num_vectors: int
) -> None:
    # "a photo of {}" is three tokens of the tiny model, of the 38 between BOS and EOS.
    message = f"num_vectors={num_vectors} .*'a photo of {{}}'.* 38 places.* need 3;.* at most 35"
    with pytest.raises(LearningError, match=message):
        TemplatePrompts.lay_out(model, ["a photo of {}", "a {}"], num_vectors)


def test_as_many_vectors_as_there_is_room_are_laid_out(model: DiffusionModel) -> None:
    prompts = TemplatePrompts.lay_out(model, ["a photo of {}", "a {}"], 35)
    assert prompts.slots[:, 0].tolist() == [4, 2]  # behind BOS and the words
    assert prompts.eos_index.tolist() == [39, 37]


def test_more_vectors_than_a_concept_file_holds_are_refused(tmp_path: Path) -> None:
    long = load_model(make_tiny_model(tmp_path, max_tokens=100, unet_channels=(8, 16)))
    TemplatePrompts.lay_out(long, ["a photo of {}"], MAX_NUM_VECTORS)
    with pytest.raises(LearningError, match="num_vectors=76 .* at most 75"):
        TemplatePrompts.lay_out(long, ["a photo of {}"], MAX_NUM_VECTORS + 1)


def test_encoder_too_short_for_the_templates_is_said(model: DiffusionModel) -> None:
    with pytest.raises(LearningError, match="38 places, the words need 40; .*longer text encoder"):
        TemplatePrompts.lay_out(model, ["a " * 40 + "{}"], 1)
