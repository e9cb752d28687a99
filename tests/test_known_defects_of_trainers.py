"""Defects of other trainers, one by one: each is named, and shown not to be here.

Those of loaders are in test_known_defects.py; the numbers count both together.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.families import time_ids
from tests.learning_setup import SIZE, objective_of, random_images, tiny_model
from tests.tiny_model import make_tiny_model, make_tiny_xl_model
from trainer.checkpoints import RunIdentity, write_checkpoint
from trainer.evaluation_measures import Yardsticks, measure
from trainer.evaluation_prompts import Prompt, PromptSet
from trainer.images import TrainingImages, read_images
from trainer.latents import LatentDistribution
from trainer.learning import learn
from trainer.material import OwnImages
from trainer.model import DiffusionModel, load_model
from trainer.onnx_graphs import VaeDecoder, VaeEncoder
from trainer.options import LearnOptions, Optimizer
from trainer.run import LearnState
from trainer.sampling import sample_images
from trainer.splicing import as_concept

OPTIONS = LearnOptions(steps=4, batch_size=2, eval_every=2, num_vectors=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def xl_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_xl_model(tmp_path_factory.mktemp("models") / "xl", max_tokens=40)


@pytest.fixture(scope="module")
def xl(xl_path: Path) -> DiffusionModel:
    return load_model(xl_path)


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    return random_images()


def last(
    model: DiffusionModel, images: TrainingImages, options: LearnOptions = OPTIONS
) -> LearnState:
    *_, state = learn(model, images, options)
    return state


# --- D6: the whole vocabulary in the optimizer ---


class SeenSizes(TorchDispatchMode):
    """Which operations, forward and backward, give a tensor with an axis of one of these sizes."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = set(sizes)
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self.sizes & set(leaf.shape):
                self.found.append(str(func))
        return result


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("family", ["model", "xl"])
def test_d06_no_step_makes_anything_as_long_as_the_vocabulary(
    family: str, optimizer: Optimizer, images: TrainingImages, request: pytest.FixtureRequest
) -> None:
    """diffusers (all its scripts), kohya, invoke-training and ai-toolkit: AdamW has the whole
    table, and all but the new rows are copied back after each step: 0.6 to 1.5 GiB more in float32
    to train 3 to 8 KB.

    Here gradient and moments are as large as the vectors, and nothing of the table is even
    touched.
    """
    model: DiffusionModel = request.getfixturevalue(family)
    tables = [encoder.text_encoder.get_input_embeddings().weight for encoder in model.encoders]
    before = [table.detach().numpy().tobytes() for table in tables]
    states = learn(model, images, dataclasses.replace(OPTIONS, optimizer=optimizer))
    first = next(states)
    with SeenSizes(*(len(table) for table in tables)) as seen:
        *_, end = states
    assert seen.found == []
    assert not torch.equal(end.vectors, first.vectors)
    for name in ("vectors", "first_moment", "second_moment"):
        assert getattr(end, name).shape == (OPTIONS.num_vectors, sum(model.dims))
    assert [table.detach().numpy().tobytes() for table in tables] == before
    assert all(
        weight.grad is None for part in model.modules.values() for weight in part.parameters()
    )


def test_d06_the_usual_way_is_seen_by_that_measure() -> None:
    """The defect itself, so that the test above is known to ask for something."""
    table = nn.Embedding(541, 24)
    with SeenSizes(541) as seen:
        table(torch.tensor([[3, 540]])).sum().backward()
    assert [name for name in seen.found if "embedding" in name and "backward" in name]


def test_d06_a_checkpoint_is_as_large_as_the_vectors(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    """The same, for what is kept on disk."""
    identity = RunIdentity.of(model, images, OPTIONS, placeholder_token="<x>")
    state = last(model, images)
    write_checkpoint(path := tmp_path / "checkpoint", state, identity)
    tensors = [getattr(state, field.name) for field in dataclasses.fields(state)]
    learned = [one for one in tensors if isinstance(one, Tensor) and one.is_floating_point()]
    assert all(one.shape == state.vectors.shape for one in learned)
    # Beside them the generator's 5 KB, and a few of names and options.
    size = sum(one.numel() * 4 for one in learned) + state.rng_state.numel()
    assert size < path.stat().st_size < size + 8192 < model.token_embedding.numel() * 4


# --- D7: one of two text encoders learns in half precision ---


def test_d07_both_text_encoders_learn_in_float32(xl_path: Path) -> None:
    """diffusers, textual_inversion_sdxl.py: the second text encoder, with the table that is
    trained, is cast to half precision after the optimizer was made, the first is not.

    Here both encoders and their vectors are float32 whatever the denoiser is. With a rate of
    1e-7 bfloat16 would round every step away.
    """
    half = load_model(xl_path, unet_dtype=torch.bfloat16)
    options = dataclasses.replace(OPTIONS, learning_rate=1e-7, initializer_token="red cat")
    first, *_, end = learn(half, random_images(2), options)
    for state in (first, end):
        for name in ("vectors", "first_moment", "second_moment", "best_vectors"):
            assert getattr(state, name).dtype == torch.float32
    concept = as_concept(half, end.vectors, placeholder_token="<x>")
    parts = (rows.split(half.dims, dim=1) for rows in (first.vectors, end.vectors))
    for before, after, kept in zip(*parts, concept.encoders, strict=True):
        moved = after - before
        # Steps of Adam are about as long as the rate; few of them cancel, or come from a zero.
        assert moved.ne(0).float().mean() > 0.95 and moved.abs().max() <= 4e-7
        rounded = before.bfloat16()
        assert (rounded + moved.bfloat16()).eq(rounded).float().mean() > 0.95
        np.testing.assert_array_equal(kept, after.numpy())


# --- D8 and D9: what becomes of a photo ---


def photo(path: Path, width: int, height: int) -> Path:
    """A grey square with a white disc and a black corner, in the middle of what is red."""
    side = min(width, height)
    square, sixth = Image.new("RGB", (side, side), "grey"), side // 6
    drawing = ImageDraw.Draw(square)
    drawing.rectangle((0, 0, sixth, sixth), fill="black")
    drawing.ellipse((sixth, sixth, side - 1 - sixth, side - 1 - sixth), fill="white")
    picture = Image.new("RGB", (width, height), "red")
    picture.paste(square, ((width - side) // 2, (height - side) // 2))
    picture.save(path)
    return path


def assert_shows_the_square(images: TrainingImages) -> None:
    """Nothing red is left, the disc is round, and the corner is the upper left one."""
    levels = ((images.pixels[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert np.ptp(levels, axis=2).max() == 0
    side = levels.shape[0]
    disc = levels[..., 0] > 192  # half-way from grey to white
    spans = [np.flatnonzero(disc.any(axis=axis)) for axis in (0, 1)]
    assert len(spans[0]) == len(spans[1]) == pytest.approx(2 / 3 * side, abs=1)
    assert levels[0, 0, 0] < 16 and min(levels[0, -1, 0], levels[-1, 0, 0]) > 112


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (640, 64)])
def test_d08_a_photo_is_cropped_and_the_denoiser_told_so(
    xl: DiffusionModel, width: int, height: int, tmp_path: Path
) -> None:
    """diffusers, textual_inversion_sdxl.py: photos are squashed to a square before they are
    cropped, so `--center_crop` does nothing and the crop's corner is always (0, 0).

    Here the centre is cropped before it is resized: a disc stays a disc, what lies beside the
    square is not seen, and the denoiser is told of a whole picture of the square's size, as when
    the word is drawn.
    """
    photo(tmp_path / "photo.png", width, height)
    images = read_images(tmp_path, size=24)
    assert_shows_the_square(images)
    told: list[Tensor] = []

    def listen(_: nn.Module, __: object, named: dict[str, Any]) -> None:
        told.append(named["added_cond_kwargs"]["time_ids"])

    hook = xl.unet.register_forward_pre_hook(listen, with_kwargs=True)
    last(xl, images)
    hook.remove()
    assert {tuple(row) for ids in told for row in ids.tolist()} == {time_ids(24, 24)}


def test_d09_photos_are_upright_whole_and_nothing_else_is_opened(tmp_path: Path) -> None:
    """diffusers, textual_inversion.py: photos are squashed, EXIF is not read, and every file of
    the folder is opened as an image, so that a .DS_Store ends the run (InvokeAI issue 2715).

    Here the folder of a phone is learned from as its owner sees it, and what is no photo is named.
    """
    photo(path := tmp_path / "phone.png", 64, 96)
    # Orientation 6: stored lying on its side, to be turned by 90 degrees clockwise.
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as picture:
        lying = picture.transpose(Image.Transpose.ROTATE_90)
    lying.save(path, exif=exif)
    (tmp_path / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1\x00")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "notes.txt").write_text("holiday")
    (tmp_path / "more").mkdir()
    images = read_images(tmp_path, size=24)
    assert images.names == ("phone.png",)
    assert_shows_the_square(images)
    skipped = {file.name: file.reason for file in images.skipped}
    assert skipped.keys() == {".DS_Store", "Thumbs.db", "more", "notes.txt"}
    assert all(skipped.values())


def test_d09_each_image_is_encoded_once(
    model: DiffusionModel, images: TrainingImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers, textual_inversion.py: the autoencoder runs in every step.

    Here it runs once for each image, however long the run is; what it says is sampled anew in
    each step.
    """
    encoded: list[int] = []
    encode: Callable[..., Any] = model.vae.encode

    def counted(pixels: Tensor, **options: Any) -> Any:
        encoded.append(len(pixels))
        return encode(pixels, **options)

    monkeypatch.setattr(model.vae, "encode", counted)
    last(model, images, dataclasses.replace(OPTIONS, steps=7))
    assert sum(encoded) == len(images.names)
    objective = objective_of(model, images)
    first, second = (
        objective.draw(3, torch.Generator().manual_seed(seed)).latents for seed in (1, 2)
    )
    assert sum(encoded) == 2 * len(images.names)
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())


def test_d09_previews_are_drawn_by_the_model_in_hand(
    images: TrainingImages, tmp_path: Path
) -> None:
    """diffusers, textual_inversion.py: each validation reads a whole pipeline from disk.

    Here nothing is read after the first moment: the folder may be gone.
    """
    model = tiny_model(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    for state in learn(model, images, OPTIONS):
        concept = as_concept(model, state.vectors, placeholder_token="<x>")
        (drawn,) = sample_images(model, [concept], ["a <x>"], size=SIZE, num_inference_steps=2)
        assert drawn.size == (SIZE, SIZE)


# --- D10: clipping a gradient that is not the true one ---


def test_d10_the_optimizer_has_the_true_gradient_whole(
    images: TrainingImages, tmp_path: Path
) -> None:
    """AUTOMATIC1111, modules/textual_inversion: gradients are clipped before the factor of mixed
    precision is taken out of them, so the limit means another one in each step.

    Here there is neither factor nor limit: Adam's first moments are a tenth of the gradient and a
    thousandth of its square, however large it is; the step is bounded by Adam itself, and the
    vectors by their length. The gradient is that of the loss as differences have it.
    """
    model = tiny_model(tmp_path)
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(100)
    options = dataclasses.replace(OPTIONS, num_vectors=1)
    first, second, *_ = learn(model, images, options)
    gradient = second.first_moment / (1 - 0.9)
    assert second.grad_norm > 10  # the usual limit is 1
    assert gradient.norm().item() == pytest.approx(second.grad_norm, rel=1e-5)
    # float32 rounds 1 - 0.9 and 1 - 0.999 to six digits and to four.
    torch.testing.assert_close(second.second_moment, 0.001 * gradient.square(), rtol=1e-4, atol=0)

    generator = torch.Generator()
    generator.set_state(first.rng_state)
    objective = OwnImages.of(model, images, options).objectives[0]
    batch = objective.draw(options.batch_size, generator)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        losses = [
            objective.losses(first.vectors + sign * step, batch).double().mean().item()
            for sign in (1, -1)
        ]
    slope = (losses[0] - losses[1]) / (2 * 1e-3)
    # Float32 losses of some hundreds, 2 % of which lie between the two: three digits.
    assert slope == pytest.approx(second.grad_norm, rel=0.01)


# --- D11: a likeness that compares the wrong pictures ---


def test_d11_likeness_is_that_of_samples_with_training_images_all_pairs() -> None:
    """DVAR, dino_scores.py: is no valid Python, and compares the source with itself; its CLIP
    score pairs pictures row by row.

    Here every sample is compared with every training image, whatever their order and number.
    """
    prompts = PromptSet(source="test", prompts=(Prompt(template="a {}", kind="likeness"),))
    axes = np.eye(6, dtype=np.float32)

    def likeness(samples: np.ndarray, training: np.ndarray) -> float:
        return measure(samples[None], prompts, Yardsticks(training=training))["image_similarity"]

    # Nothing in common; the source with itself would give 1/3.
    assert likeness(axes[:3], axes[3:]) == pytest.approx(0.0, abs=1e-7)
    # All the same pictures: row by row 1 in this order, 0 in the other; of all pairs a third.
    for order in ([0, 1, 2], [1, 2, 0]):
        assert likeness(axes[:3], axes[order]) == pytest.approx(1 / 3, abs=1e-7)
    # Two samples and three images cannot be paired at all: two cosines of six are 1.
    assert likeness(axes[:2], axes[:3]) == pytest.approx(2 / 6, abs=1e-7)


# --- D12: a scaling factor written down by hand ---


@pytest.mark.parametrize(("factor", "shift"), [(0.18215, None), (0.13025, None), (0.3611, 0.1159)])
def test_d12_latents_are_scaled_as_the_autoencoder_says(
    tmp_path: Path, factor: float, shift: float | None
) -> None:
    """QuickEmbedding: one of two paths scales latents by 0.18125, where 0.18215 is meant.

    Here the factor is read from the config of the autoencoder, once: what learning sees, what
    previews decode and what the exported graphs do belong together.
    """
    model = load_model(make_tiny_model(tmp_path, scaling_factor=factor))
    model.vae.register_to_config(shift_factor=shift)
    pixels = random_images(2).pixels
    encoded: Any = model.vae.encode(pixels)
    wanted = (encoded.latent_dist.mean - (shift or 0.0)) * factor
    learned = LatentDistribution.encode(model, pixels)
    served, _ = VaeEncoder(model.vae, model.scaling_factor, model.shift_factor)(pixels)
    # One image at a time or both at once: the same convolutions in another order.
    torch.testing.assert_close(learned.mean, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(served, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learned.std, encoded.latent_dist.std * factor, rtol=1e-4, atol=1e-5)
    decoder = VaeDecoder(model.vae, model.scaling_factor, model.shift_factor)
    decode: Any = model.vae.decode
    decoded = decode(encoded.latent_dist.mean).sample
    torch.testing.assert_close(decoder(learned.mean), decoded, rtol=1e-3, atol=1e-4)
