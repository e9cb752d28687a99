"""The text encoder from embeddings against transformers' own, with vectors in its vocabulary."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny_model import make_tiny_model
from trainer.encoder_modules import ClipTextEncoder
from trainer.model import DiffusionModel, load_model

# float32 through two layers; the two differ at most in how attention is masked.
ATOL = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model")))


def ids_with_slots(model: DiffusionModel, words: str, counts: list[int]) -> tuple[Tensor, Tensor]:
    """`words ? ? words ? EOS EOS...`, with ids beyond the vocabulary for the slots; EOS's index."""
    tokenizer: Any = model.tokenizer
    vocabulary = len(tokenizer)
    text = tokenizer(words, add_special_tokens=False).input_ids
    ids: list[int] = [tokenizer.bos_token_id, *text]
    for count in counts:
        ids += [*range(vocabulary, vocabulary + count), *text]
        vocabulary += count
    eos_index = len(ids)
    ids += [tokenizer.eos_token_id] * (model.max_tokens - len(ids))
    return torch.tensor([ids]), torch.tensor([eos_index])


def grown(model: DiffusionModel, vectors: Tensor) -> CLIPTextModel | CLIPTextModelWithProjection:
    """The reference: a copy with a larger vocabulary and the vectors written into its table."""
    text_encoder = copy.deepcopy(model.text_encoder)
    rows = len(model.tokenizer)
    text_encoder.resize_token_embeddings(rows + len(vectors), mean_resizing=False)
    table: Any = text_encoder.get_input_embeddings().weight
    table.data[rows:] = vectors
    return text_encoder


@pytest.mark.parametrize("counts", [[1], [4], [1, 3], [2, 1, 2]], ids=str)
def test_spliced_vectors_equal_a_vocabulary_that_has_grown(
    model: DiffusionModel, counts: list[int]
) -> None:
    vectors = torch.randn(sum(counts), 24, generator=torch.Generator().manual_seed(1))
    input_ids, eos_index = ids_with_slots(model, "a cat", counts)
    inputs_embeds = torch.cat([model.token_embedding, vectors])[input_ids]
    prompt_embeds, pooled = ClipTextEncoder(model.text_encoder)(inputs_embeds, eos_index)
    expected = grown(model, vectors)(input_ids)
    torch.testing.assert_close(prompt_embeds, expected.last_hidden_state, rtol=0.0, atol=ATOL)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0.0, atol=ATOL)


def test_a_batch_is_pooled_at_each_rows_own_eos(model: DiffusionModel) -> None:
    texts = ["a photo of a cat", "the red dog in the morning", ""]
    ids = model.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    eos_index = (ids == model.tokenizer.eos_token_id).int().argmax(-1)
    prompt_embeds, pooled = ClipTextEncoder(model.text_encoder)(
        model.token_embedding[ids], eos_index
    )
    expected = model.text_encoder(ids)
    assert len(set(eos_index.tolist())) == 3
    torch.testing.assert_close(prompt_embeds, expected.last_hidden_state, rtol=0.0, atol=ATOL)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0.0, atol=ATOL)


def test_projects_the_pooled_embedding_where_the_model_does() -> None:
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=10,
        projection_dim=16,
        eos_token_id=49,
    )
    torch.manual_seed(3)
    reference = CLIPTextModelWithProjection(config).eval()
    ids = torch.tensor([[48, 1, 2, 49, 49, 49, 49, 49, 49, 49]])
    embeds = reference.get_input_embeddings()(ids)
    prompt_embeds, pooled = ClipTextEncoder(reference)(embeds, torch.tensor([3]))
    expected = reference(ids)
    torch.testing.assert_close(prompt_embeds, expected.last_hidden_state, rtol=0.0, atol=ATOL)
    torch.testing.assert_close(pooled, expected.text_embeds, rtol=0.0, atol=ATOL)


def test_only_the_input_gets_a_gradient(model: DiffusionModel) -> None:
    encoder = ClipTextEncoder(copy.deepcopy(model.text_encoder).requires_grad_(True))
    inputs_embeds = model.token_embedding[:20][None].clone().requires_grad_(True)
    prompt_embeds, _ = encoder(inputs_embeds, torch.tensor([5]))
    prompt_embeds[:, 7, 0].sum().backward()  # of all of them the sum is constant: a LayerNorm
    assert all(parameter.grad is None for parameter in encoder.parameters())
    gradient = inputs_embeds.grad
    assert gradient is not None and bool(gradient[0, :8].abs().amax(-1).gt(0).all())
    # Causal: what comes later has no say, exactly.
    assert not gradient[0, 8:].any()


def test_masks_without_infinities_in_half_precision(model: DiffusionModel) -> None:
    ids = model.tokenizer(["a photo of a cat"], padding="max_length", return_tensors="pt").input_ids
    expected, _ = ClipTextEncoder(model.text_encoder)(model.token_embedding[ids], torch.tensor([6]))
    half = ClipTextEncoder(copy.deepcopy(model.text_encoder)).half()
    assert bool(half.causal_mask.isfinite().all())
    found, _ = half(model.token_embedding[ids].half(), torch.tensor([6]))
    # float16 has 11 bits (5e-4); two layers of sums over 24 to 48 terms stay within ten of those.
    np.testing.assert_allclose(found.float().numpy(), expected.numpy(), atol=5e-3)


def test_the_tiny_model_is_in_no_size_like_the_embedded_one(tmp_path: Path) -> None:
    tiny = load_model(make_tiny_model(tmp_path))
    embedded = load_model(Path(__file__).parent.parent / "models" / "emoji")
    for name in ("max_tokens", "scale_factor", "scaling_factor", "prediction_type"):
        assert getattr(tiny, name) != getattr(embedded, name), name
    assert tiny.token_embedding.shape[1] != embedded.token_embedding.shape[1]
