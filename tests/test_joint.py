"""Several words learned in one run, with images that show all of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.concepts import Concept
from engine.prompts import PromptReader
from tests.learning_setup import random_images, tiny_model
from tests.tiny_model import XL_DIMS, make_tiny_xl_model
from trainer.checkpoints import RunIdentity, read_checkpoint, write_checkpoint
from trainer.diffusion_loss import diffusion_loss
from trainer.errors import LearningError
from trainer.images import TrainingImages
from trainer.joint import JointImages, JointWord, joint_concepts, learn_jointly, sentences_for
from trainer.learning import learn
from trainer.material import losses_and_gradients, prompts_of
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions
from trainer.run import LearnState
from trainer.splicing import plain_tokenizer, text_spec

OPTIONS = LearnOptions(steps=4, batch_size=2, eval_every=2)
SENTENCES = ("a photo of {0} in the {1}", "{1} of the red {0}")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(model_path: Path) -> DiffusionModel:
    return tiny_model(model_path)


@pytest.fixture(scope="module")
def words() -> list[JointWord]:
    captioned = dataclasses.replace(random_images(2, seed=2), captions=(("red {}",), ()))
    return [
        JointWord(placeholder_token="<one>", images=random_images(3, seed=1), num_vectors=2),
        JointWord(placeholder_token="<two>", images=captioned, initializer_token="cat"),
    ]


@pytest.fixture(scope="module")
def together() -> TrainingImages:
    return random_images(2, seed=5)


def _last(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages, **more: Any
) -> LearnState:
    return list(learn_jointly(model, words, together, OPTIONS, **more))[-1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_are_those_of_a_vocabulary_enlarged_by_both_words(
    tmp_path: Path, words: list[JointWord], together: TrainingImages
) -> None:
    """Against transformers as trainers use it: new tokens, a resized table, ids as input."""
    model = tiny_model(tmp_path)
    material = JointImages.of(model, words, together, OPTIONS, SENTENCES)
    parts = material.draw(3, torch.Generator().manual_seed(3), num_vectors=3)
    vectors = 0.3 * torch.randn((3, 24), generator=torch.Generator().manual_seed(0))
    ((loss, gradient),) = losses_and_gradients([(vectors, parts)], max_rows=99)

    names = ("<one-0> <one-1>", "<two>")
    tokenizer = model.tokenizer
    encoder: Any = model.text_encoder
    tokenizer.add_tokens(" ".join(names).split())
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-3:] = vectors
    table.requires_grad_(True)
    own_templates = _templates(words)
    losses: list[Tensor] = []
    for part, templates, named in zip(
        parts, (*own_templates, SENTENCES), (names[:1], names[1:], names), strict=True
    ):
        texts = [templates[index].format(*named) for index in part.batch.templates]
        ids = tokenizer(texts, padding="max_length", max_length=40, return_tensors="pt").input_ids
        losses.append(
            diffusion_loss(
                model.unet,
                part.objective.schedule,
                latents=part.batch.latents,
                noise=part.batch.noise,
                timesteps=part.batch.timesteps,
                prompt_embeds=encoder(ids).last_hidden_state,
            )
        )
    expected = torch.cat(losses).mean()
    expected.backward()
    assert table.grad is not None
    # Two implementations of the same attention mask and of float32 sums.
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for row in range(3):
        wanted = table.grad[len(table) - 3 + row]
        scale = wanted.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradient[row], wanted, rtol=1e-5, atol=1e-5 * scale)


def _templates(words: list[JointWord]) -> list[tuple[str, ...]]:
    return [prompts_of(word.images, word.learnable_property).texts for word in words]


def test_each_part_moves_the_words_that_it_names(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages
) -> None:
    material = JointImages.of(model, words, together, OPTIONS, SENTENCES)
    parts = material.draw(2, torch.Generator().manual_seed(3), num_vectors=3)
    vectors = 0.3 * torch.randn((3, 24), generator=torch.Generator().manual_seed(0))
    moved = [
        losses_and_gradients([(vectors, [part])], max_rows=99)[0][1].any(dim=1).tolist()
        for part in parts
    ]
    assert moved == [[True, True, False], [False, False, True], [True, True, True]]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_are_spliced_as_the_engine_splices_both_words(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages, sentence: str
) -> None:
    material = JointImages.of(model, words, together, OPTIONS, [sentence])
    vectors = torch.randn((3, 24), generator=torch.Generator().manual_seed(0))
    concepts = [
        Concept(placeholder_token=word.placeholder_token, learned_embeddings=own.numpy())
        for word, own in zip(words, vectors.split([2, 1]), strict=True)
    ]
    reader = PromptReader(plain_tokenizer(model), model.token_embedding.numpy(), text_spec(model))
    read = reader.read(sentence.format("<one>", "<two>"), concepts)
    prompts = material.sources[-1].prompts
    spliced = prompts.splice(vectors, torch.tensor([0]))
    assert torch.equal(spliced, torch.from_numpy(read.inputs_embeds))
    assert prompts.eos_index.tolist() == read.eos_index.tolist()


def test_a_joint_run_learns_all_words_and_takes_them_apart(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages
) -> None:
    states = list(learn_jointly(model, words, together, OPTIONS))
    first, last = states[0], states[-1]
    assert [state.step for state in states] == [0, 1, 2, 3, 4]
    assert (last.vectors != first.vectors).any(dim=1).all()
    # Each word starts as it would alone.
    options = dataclasses.replace(OPTIONS, num_vectors=2)
    alone = next(learn(model, words[0].images, options))
    assert torch.equal(first.vectors[:2], alone.vectors)
    concepts = joint_concepts(model, words, OPTIONS, last)
    assert [concept.placeholder_token for concept in concepts] == ["<one>", "<two>"]
    joined = torch.cat([torch.from_numpy(one.learned_embeddings) for one in concepts])
    assert torch.equal(joined, last.best_vectors)
    one, two = (concept.metadata for concept in concepts)
    assert one["learned_with"] == "<two>" and one["num_vectors"] == "2"
    assert two["learned_with"] == "<one>" and two["initializer_token"] == "cat"


def test_evaluation_is_the_mean_over_all_images(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages
) -> None:
    last = _last(model, words, together, sentences=SENTENCES)
    material = JointImages.of(model, words, together, OPTIONS, SENTENCES)
    losses: list[Tensor] = []
    for part in material.evaluation(num_vectors=3):
        trial = part.trial(last.vectors)
        losses.append(part.objective.losses(trial.vectors, part.batch))
    # In batches of another size.
    assert last.evaluation_loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_resumed_from_a_checkpoint_gives_the_same_bits(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages, tmp_path: Path
) -> None:
    states = list(learn_jointly(model, words, together, OPTIONS))
    identity = RunIdentity.of(model, together, OPTIONS, placeholder_token="<one> <two>")
    write_checkpoint(tmp_path / "checkpoint", states[1], identity)
    middle = read_checkpoint(tmp_path / "checkpoint", identity)
    last = _last(model, words, together, resume_from=middle)
    assert torch.equal(last.vectors, states[-1].vectors)
    assert torch.equal(last.best_vectors, states[-1].best_vectors)
    assert last.evaluation_losses == states[-1].evaluation_losses


def test_sentences_name_the_words_in_both_orders() -> None:
    found = sentences_for(2)
    assert found[:2] == ("a photo of {0} and {1}", "a photo of {1} and {0}")
    assert found[2] == "a photo of a {0} and a {1}"
    assert len(set(found)) == len(found)
    assert sentences_for(3)[0] == "a photo of {0} and {1} and {2}"


@pytest.mark.parametrize(
    "sentence",
    ["a photo of {0}", "{0} and {0} and {1}", "{} and {}", "{0} and {1} {2}", "{0.x} {1}"],
)
def test_a_sentence_that_does_not_name_each_word_once_is_refused(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages, sentence: str
) -> None:
    with pytest.raises(LearningError, match=r"each word once.* \{0\}, \{1\}; as in"):
        _last(model, words, together, sentences=[sentence])


def test_a_sentence_that_cannot_be_read_is_refused(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages
) -> None:
    for sentence, message in (
        ("{0} and {1", "cannot be read"),
        ("\\{0} and {1}", "must name each new word once; a backslash"),
    ):
        with pytest.raises(LearningError, match=message):
            _last(model, words, together, sentences=[sentence])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_vectors": 2}, "num_vectors=2 belongs to a word; give it with each JointWord"),
        ({"initializer_token": "cat"}, "initializer_token='cat' belongs to a word"),
        ({"learnable_property": "style"}, "learnable_property='style' belongs to a word"),
        ({"per_image_tokens": True}, "per_image_tokens is for one word alone"),
        ({"warm_start": 5}, "warm_start is for one word alone"),
    ],
)
def test_options_that_are_a_words_own_are_refused(
    model: DiffusionModel,
    words: list[JointWord],
    together: TrainingImages,
    changed: dict[str, Any],
    message: str,
) -> None:
    options = dataclasses.replace(OPTIONS, **changed)
    with pytest.raises(LearningError, match=message):
        next(learn_jointly(model, words, together, options))


def test_words_that_cannot_be_learned_together_are_refused(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages
) -> None:
    twin = dataclasses.replace(words[1], placeholder_token="<one>")
    searched = dataclasses.replace(words[1], initializer_token="auto")
    empty = dataclasses.replace(words[1], num_vectors=0)
    for given, message in (
        (words[:1], "at least 2 words, got 1"),
        ([words[0], twin], "two words .* '<one>'; rename"),
        ([words[0], searched], "<two>: a joint run does not search"),
        ([words[0], empty], "<two>: num_vectors must be at least 1, got 0"),
    ):
        with pytest.raises(LearningError, match=message):
            _last(model, given, together)


def test_images_of_several_sizes_are_refused(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages
) -> None:
    larger = dataclasses.replace(together, pixels=torch.zeros(2, 3, 24, 24))
    with pytest.raises(LearningError, match=r"several sizes \(16 x 16, 24 x 24\)"):
        _last(model, words, larger)


def test_words_of_two_encoders_are_learned_together(tmp_path: Path) -> None:
    model = load_model(make_tiny_xl_model(tmp_path, max_tokens=40))
    images = [
        dataclasses.replace(random_images(2, seed=seed), pixels=pixels)
        for seed, pixels in enumerate(torch.zeros(3, 2, 3, 24, 24))
    ]
    words = [
        JointWord(placeholder_token=f"<{place}>", images=own, num_vectors=place)
        for place, own in enumerate(images[:2], start=1)
    ]
    options = LearnOptions(steps=1, batch_size=1)
    first, last = learn_jointly(model, words, images[2], options)
    assert last.vectors.shape == (3, sum(XL_DIMS))
    for before, after in zip(
        first.vectors.split(XL_DIMS, dim=1), last.vectors.split(XL_DIMS, dim=1), strict=True
    ):
        assert (before != after).any(dim=1).all()
    assert [one.num_vectors for one in joint_concepts(model, words, options, last)] == [1, 2]


def test_more_vectors_than_a_sentence_leaves_room_for_are_refused(
    model: DiffusionModel, words: list[JointWord], together: TrainingImages
) -> None:
    many = [dataclasses.replace(word, num_vectors=17) for word in words]
    # Of 38 places the longest sentence, in which letters are tokens, has 15.
    with pytest.raises(LearningError, match=r"17 \+ 17 is too many .* at most 23 together"):
        _last(model, many, together)
