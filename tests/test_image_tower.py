"""Image towers: which CLIP belongs to a model, and that it sees and reads as it was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from tests.learning_setup import tiny_model
from tests.tiny_model import make_tiny_ldm_model, make_tiny_xl_model
from tests.tiny_tower import MEAN, SIDE, STD, load_clip, make_tiny_tower
from trainer.errors import LearningError
from trainer.hub_encoders import ClipEncoder
from trainer.image_tower import lent, open_image_towers
from trainer.model import DiffusionModel, load_model

SENTENCES = ["a photo of a cat", "the red dog in the morning", "a"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(make_tiny_xl_model(tmp_path_factory.mktemp("xl"), max_tokens=40))


@pytest.fixture(scope="module")
def folder(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tower(tmp_path_factory.mktemp("tower"), model)


# --- which towers belong to a model ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_models_own_clip_is_accepted_in_any_precision(
    model: DiffusionModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    (tower,) = open_image_towers([str(make_tiny_tower(tmp_path, model, dtype=dtype))], model)
    assert tower.encoder == 0
    assert tower.clip.model.dtype == torch.float32
    assert tower.identity.startswith("SHA-256 ")


def test_a_clip_with_layers_behind_the_models_last_is_accepted(
    model: DiffusionModel, tmp_path: Path
) -> None:
    """Stable Diffusion 2.x leaves the last layer of its text encoder out."""
    path = make_tiny_tower(tmp_path, model, more_layers=1)
    (tower,) = open_image_towers([str(path)], model)
    assert len(tower.text_half().layers) == 3


def test_each_tower_finds_the_text_encoder_that_it_belongs_to(
    xl_model: DiffusionModel, tmp_path: Path
) -> None:
    paths = [
        str(make_tiny_tower(tmp_path / str(place), xl_model, encoder=place)) for place in (0, 1)
    ]
    assert [tower.encoder for tower in open_image_towers(paths, xl_model)] == [0, 1]
    assert [tower.encoder for tower in open_image_towers(paths[::-1], xl_model)] == [1, 0]
    with pytest.raises(LearningError, match="both belong to the model's text_encoder_2; give one"):
        open_image_towers([paths[1], paths[1]], xl_model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("embeddings.token_embedding.weight", "the values of embeddings.token_embedding.weight"),
        ("encoder.layers.1.mlp.fc2.weight", "the values of encoder.layers.1.mlp.fc2.weight differ"),
        ("final_layer_norm.bias", "the values of final_layer_norm.bias differ"),
    ],
)
def test_a_clip_of_another_training_is_refused(
    model: DiffusionModel, folder: Path, tmp_path: Path, changed: str, message: str
) -> None:
    """Every tensor counts, and a difference of a twentieth in one number is enough."""
    _copied(folder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (name,) = (name for name in weights if name == f"text_model.{changed}")
    weights[name].view(-1)[-1] = weights[name].view(-1)[-1] * 1.05 + 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LearningError, match=message):
        open_image_towers([str(tmp_path)], model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', the model's 'quick_gelu'"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, the model's 2"),
        ({"hidden_size": 16}, r"token_embedding.weight is \(\d+, 16\), the model's \(\d+, 24\)"),
        ({"num_hidden_layers": 1}, "it has no encoder.layers.1"),
    ],
)
def test_a_clip_of_another_shape_is_refused(
    model: DiffusionModel, folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = make_tiny_tower(tmp_path, model, **options)
    weights = load_file(path / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        if name in weights and weights[name].shape == weight.shape:
            weights[name] = weight
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LearningError, match=f"does not belong to .*{message}"):
        open_image_towers([str(path)], model)


def test_a_model_without_clip_has_no_tower(folder: Path, tmp_path: Path) -> None:
    ldm = load_model(make_tiny_ldm_model(tmp_path))
    with pytest.raises(LearningError, match="it is a LDMBertModel, which has no image tower"):
        open_image_towers([str(folder)], ldm)


def test_another_projection_of_a_projecting_encoder_is_refused(
    xl_model: DiffusionModel, tmp_path: Path
) -> None:
    path = make_tiny_tower(tmp_path, xl_model, encoder=1)
    weights = load_file(path / "model.safetensors")
    weights["text_projection.weight"] *= 2
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LearningError, match="the values of text_projection differ"):
        open_image_towers([str(path)], xl_model)


def test_what_is_no_clip_is_refused(model: DiffusionModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LearningError, match="--image-tower: no such folder: /nowhere/at/all"):
        open_image_towers(["/nowhere/at/all"], model)
    _copied(folder, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(LearningError, match="--image-tower: cannot read the encoder"):
        open_image_towers([str(tmp_path)], model)
    dino = tmp_path / "dino"
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    make: Any = Dinov2Model
    make(Dinov2Config(**sizes, image_size=SIDE, patch_size=8)).save_pretrained(dino)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (dino / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(LearningError, match="dino is a dino; give a CLIP"):
        open_image_towers([str(dino)], model)


def test_a_tower_that_is_stored_in_shards_is_told_from_another(
    model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    def identity(factor: float) -> str:
        clip = load_clip(folder)
        clip.visual_projection.weight.data *= factor
        path = tmp_path / str(factor)
        _copied(folder, path)
        (path / "model.safetensors").unlink()
        clip.save_pretrained(path, max_shard_size="50KB")
        assert not (path / "model.safetensors").exists()
        return open_image_towers([str(path)], model)[0].identity

    assert identity(1.0) == identity(1.0) != identity(2.0)


# --- what a tower says ---


def _pixels(size: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    levels = torch.randint(0, 256, (3, 3, size, size), generator=generator)
    return levels.float() / 127.5 - 1.0


@torch.no_grad()
def test_pictures_are_seen_as_transformers_has_it(model: DiffusionModel, folder: Path) -> None:
    (tower,) = open_image_towers([str(folder)], model)
    pixels = _pixels()
    normalized = ((pixels + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    expected = load_clip(folder)(
        input_ids=torch.tensor([[0]]), pixel_values=normalized
    ).image_embeds
    # float32 sums of some hundred products in another order.
    torch.testing.assert_close(tower.image_embeds(pixels), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_text_half_of_embeddings_is_the_towers_own(model: DiffusionModel, folder: Path) -> None:
    """Both ways of a sentence, as text and as embeddings, against transformers' forward."""
    (tower,) = open_image_towers([str(folder)], model)
    clip, tokenizer = load_clip(folder), model.tokenizer
    for sentence in SENTENCES:
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        expected = clip(input_ids=ids, pixel_values=torch.zeros(1, 3, SIDE, SIDE)).text_embeds
        _, pooled = tower.text_half()(model.token_embedding[ids], torch.tensor([ids.shape[1] - 1]))
        units = pooled / pooled.norm(dim=1, keepdim=True)
        torch.testing.assert_close(units, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tower.text_embeds([sentence]), expected, rtol=1e-4, atol=1e-5)


def test_a_tower_that_gives_nan_is_refused(
    model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    _copied(folder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tower,) = open_image_towers([str(tmp_path)], model)
    with pytest.raises(LearningError, match="numbers that are not finite; its weights are broken"):
        tower.image_embeds(_pixels())


def test_towers_go_back_to_the_cpu_whatever_happens(
    model: DiffusionModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = open_image_towers([str(folder)], model)
    moves: list[str] = []
    monkeypatch.setattr(ClipEncoder, "to", lambda _, device: moves.append(str(device)))
    with pytest.raises(ZeroDivisionError), lent(towers, torch.device("cuda")):
        raise ZeroDivisionError
    assert moves == ["cuda", "cpu"]


def _copied(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
