"""The recipe from pack to model, in seconds: what it writes loads, and draws what it drew here."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from models.recipe import tokens
from models.recipe.__main__ import main
from models.recipe.errors import RecipeError
from models.recipe.settings import SETTINGS
from models.recipe.sheets import draw
from models.recipe.stages import Recipe
from tests.recipe_toy import TINY, tiny_recipe
from trainer.model import load_model
from trainer.splicing import plain_tokenizer

PROMPTS = ("a dog on a blue background", "two mice in the snow in noto style")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe that was stopped at once, and then ran to its end."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("recipe"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_CORPUS_CAPTIONS", 300)
        assert not recipe.run(minutes=0)
        assert not (recipe.folder / "vae").exists()
        assert recipe.run()
    return recipe


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> Path:
    target = recipe.folder.parent / "model"
    target.mkdir()
    (target / "README.md").write_text("a model card")
    recipe.export(target, shard_size="40KB")
    return target


def test_the_exported_model_draws_what_the_recipe_drew(recipe: Recipe, model: Path) -> None:
    load: Any = StableDiffusionPipeline.from_pretrained
    exported = load(model, safety_checker=None)
    exported.set_progress_bar_config(disable=True)
    expected = draw(recipe.pipeline(), PROMPTS, steps=4)
    found = draw(exported, PROMPTS, steps=4)
    assert expected.shape == (2, TINY.image_size, TINY.image_size, 3)
    assert np.ptp(expected) > 20, "an even picture says nothing"
    # Weights of float16 (11 bits) against float32, over four steps: a few levels of 255, and far
    # less than what another prompt and seed change.
    error = np.abs(found.astype(int) - expected)
    assert error.max() <= 4
    assert error.mean() < 0.1 * np.abs(expected[0].astype(int) - expected[1]).mean()


def test_the_exported_model_does_not_say_where_it_was_made(model: Path) -> None:
    for config in model.rglob("*.json"):
        assert "_name_or_path" not in config.read_text()


def test_the_trainer_takes_the_exported_model(model: Path) -> None:
    loaded = load_model(model)
    assert loaded.prediction_type == "v_prediction"
    assert loaded.scaling_factor == 1.0 and loaded.shift_factor == 0.0
    assert loaded.max_tokens == TINY.max_tokens
    assert loaded.scale_factor == TINY.downsampling


def test_no_file_is_larger_than_a_shard_and_other_files_stay(model: Path) -> None:
    weights = list(model.rglob("*.safetensors"))
    assert any(len(list(path.parent.glob("*.safetensors"))) > 1 for path in weights)
    for path in weights:
        # A shard holds one tensor at least, and its header comes on top.
        assert path.stat().st_size < 40_000 + 20_000, path
    assert (model / "README.md").read_text() == "a model card"
    assert not list(model.parent.glob("*.partial"))


def test_text_survives_the_tokenizer(recipe: Recipe) -> None:
    tokenizer: Any = recipe.tokenizer()
    for text in ("a photo of two mice", "an apple , on a red and white striped background"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    words = tokenizer("dog").input_ids
    assert len(words) == 3, "a word of the captions is one token"


def test_every_byte_has_a_token_and_ids_have_no_gap(recipe: Recipe) -> None:
    tokenizer: Any = recipe.tokenizer()
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert len(tokenizer) <= TINY.vocabulary_size
    strange = "".join(map(chr, range(33, 0x250))) + "狐🦊ё"
    for letter in filter(lambda one: not one.isspace(), strange):  # spaces only part words
        ids = tokenizer(letter, add_special_tokens=False).input_ids
        # EOS stands for unknown bytes here: none may be unknown.
        assert ids and tokenizer.eos_token_id not in ids, repr(letter)


def test_the_engine_reads_the_tokenizer_as_the_recipe_does(recipe: Recipe, model: Path) -> None:
    ours: Any = recipe.tokenizer()
    theirs = plain_tokenizer(load_model(model))
    for text in (*PROMPTS, "", "A  Dog,ON\na 3rd hill's top", "狐 🦊", "dog" * 30):
        expected = ours(text, truncation=False).input_ids
        assert theirs.encode(text).ids == expected, text


def test_a_finished_recipe_has_nothing_left_to_do(recipe: Recipe) -> None:
    before = (recipe.folder / "denoiser.pt").read_bytes()
    assert recipe.run()
    assert len((recipe.folder / "denoiser.pt").read_bytes()) == len(before)


def test_a_checkpoint_of_another_setting_is_refused(recipe: Recipe) -> None:
    other = replace(recipe, setting=replace(TINY, denoiser_channels=(16, 32)))
    with pytest.raises(RecipeError, match="is of another setting"):
        other.pipeline()
    with pytest.raises(RecipeError, match="belongs to another model .*--setting"):
        other.run()


def test_a_damaged_stage_is_named(recipe: Recipe, tmp_path: Path) -> None:
    empty = replace(recipe, folder=tmp_path)
    with pytest.raises(RecipeError, match="no denoiser in .* yet; run: .* train --setting tiny"):
        empty.export(tmp_path / "model")
    with pytest.raises(RecipeError, match="there is no .*vae yet"):
        empty.vae()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(RecipeError, match="cannot read .*vae .*delete it, it is made anew"):
        empty.vae()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "there is no icon pack at .*models.recipe icons"),
        (["sheet"], "there is no denoiser in .* train --setting small"),
        (["train", "--device", "cuda:99"], "device 'cuda:99' cannot be used here .*--device cpu"),
        (["train", "--device", "cup"], "device 'cup' cannot be used here"),
        (["train", "--device", "meta"], "device 'meta' is not supported; choose of: cpu, cuda"),
        (["export", "model"], "there is no denoiser"),
        (["pairs"], "there is no .*vae yet"),
        (["pack-state", "state"], "there is no training in .* to pack yet"),
        (["unpack-state", "state"], "state holds no whole state"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_commands_say_in_one_line_what_is_missing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--work", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_matches(error, "models.recipe: " + message)


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--setting", "huge"])
    error = capsys.readouterr().err
    assert all(name in error for name in SETTINGS)


def test_icons_without_npm_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for command in ("icons", "rehearse"):
        assert main([command, "--work", str(tmp_path)]) == 1
        assert_matches(capsys.readouterr().err, "npm was not found .*install Node.js")


def test_a_run_that_is_stopped_says_that_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "run", stopped)
    assert main(["train", "--device", "cpu", "--work", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"
