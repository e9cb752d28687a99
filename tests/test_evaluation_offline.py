"""The offline evaluator as an encoder: what it says of itself, and a whole evaluation with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from engine.concepts import Concept, write_concept
from engine.requests import Limits
from engine.sessions import Feeds
from models.recipe.evaluator import EvaluatorNetwork
from models.recipe.evaluator_files import export_evaluator
from tests.fakes import DIM, FakeDenoiser, make_pipeline
from trainer.encoders import EvaluatorEncoder, open_encoder
from trainer.evaluation import DrawingOptions, Evaluation
from trainer.evaluation_errors import EncoderError
from trainer.evaluation_prompts import DEFAULT_PROMPTS
from trainer.evaluation_subjects import read_subjects
from trainer.evaluator import IMAGE_FILE, Evaluator, EvaluatorSpec

WORDS = ("[PAD]", "[UNK]", "a", "photo", "of", "cat", "in", "the", "snow", "and", "car")


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return tokenizer


class _Sessions:
    """Pictures by their mean levels, sentences by their length."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        if "pixels" in feeds:
            return {"image_embeds": feeds["pixels"].mean(axis=(2, 3))}
        lengths = feeds["attention_mask"].sum(axis=1)[:, None]
        return {"text_embeds": np.concatenate([lengths, lengths, lengths], 1).astype(np.float32)}


@pytest.fixture
def encoder() -> EvaluatorEncoder:
    spec = EvaluatorSpec(
        image_size=16, embed_dim=3, max_tokens=4, pixel_mean=0.5, pixel_std=0.5, logit_scale=10.0,
        logit_bias=-5.0, nouns=("cat", "fox"), held_out_nouns=("fox",), styles=("flat", "noto"),
        colours=("blue",),
    )  # fmt: skip
    evaluator = Evaluator(spec, _Sessions(), _Sessions(), _tokenizer())
    return EvaluatorEncoder(evaluator, name="stand-in", identity="none")


def test_the_evaluator_says_what_it_can_judge(encoder: EvaluatorEncoder) -> None:
    description = encoder.description
    assert (description.kind, description.reads_text) == ("evaluator", True)
    assert "2 emoji objects, 2 drawing styles" in description.judges
    assert "a photograph, another object" in description.judges


def test_texts_that_the_evaluator_cannot_read_are_refused(encoder: EvaluatorEncoder) -> None:
    assert encoder.text_embeds(["a cat", "a"]).tolist() == [[2, 2, 2], [1, 1, 1]]
    with pytest.raises(EncoderError, match="has 5 tokens, the evaluator reads 4; shorten it"):
        encoder.text_embeds(["a cat in the snow"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights, exported as the embedded model's evaluator is."""
    folder = tmp_path_factory.mktemp("evaluator")
    torch.manual_seed(0)
    network = EvaluatorNetwork(len(WORDS))
    for parameter in network.parameters():
        if parameter.ndim == 1:  # residual branches begin as zero, and would not be seen
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    export_evaluator(
        network.eval(), _tokenizer(), folder, nouns=["cat"], held_out_nouns=[], styles=["flat"]
    )
    return folder


@pytest.mark.slow
def test_an_evaluation_from_end_to_end(folder: Path, tmp_path: Path) -> None:
    """Files in, numbers out: what is tested is that everything fits together."""
    images = tmp_path / "images"
    images.mkdir()
    for place in range(2):
        levels = np.random.default_rng(place).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(levels).save(images / f"{place}.png")
    vectors = np.random.default_rng(0).normal(size=(1, DIM)).astype(np.float32)
    path = tmp_path / "x.safetensors"
    write_concept(Concept(placeholder_token="<x>", learned_embeddings=vectors), path)
    pipeline = make_pipeline(FakeDenoiser(), limits=Limits(max_images_per_request=10))
    options = DrawingOptions(
        sampler="ddim", num_inference_steps=2, guidance_scale=5.0, num_samples=2
    )
    encoder = open_encoder(str(folder))
    assert encoder.description.identity.startswith("SHA-256 ")
    subjects = read_subjects([str(path)], [images], ["cat"], size=64)
    evaluation = Evaluation(pipeline, [encoder], DEFAULT_PROMPTS, options)
    evaluation.check(subjects)
    concept, training, *references = evaluation.judge(subjects[0])
    measures = concept.measures[str(folder)]
    assert {"image_similarity", "text_similarity_class_word", "diversity"} <= set(measures)
    assert all(abs(value.mean) <= 1.0001 for value in training.measures[str(folder)].values())
    assert [found.role for found in references] == ["class word", "word left out", "random images"]


@pytest.mark.slow
def test_a_broken_evaluator_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / IMAGE_FILE).write_bytes(b"")
    with pytest.raises(EncoderError, match=f"cannot open the evaluator: .*{IMAGE_FILE} is not the"):
        open_encoder(str(tmp_path))
