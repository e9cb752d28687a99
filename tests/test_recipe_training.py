"""Training of the recipe: courses that stop and go on, exact normalization, latents, slices."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Normal

from models.recipe import latents as latents_module
from models.recipe.autoencoder import new_autoencoder, normalized, psnr
from models.recipe.compositions import Composer
from models.recipe.courses import DECAY_FROM, Course
from models.recipe.denoiser import stratified_timesteps
from models.recipe.errors import RecipeError
from models.recipe.latents import LatentPool
from models.recipe.pictures import composed_batches, to_tensor
from models.recipe.slices import compacted, expanded, pack_state, unpack_state
from models.recipe.stages import for_training
from tests.recipe_toy import TINY, tiny_recipe, toy_icons

CPU = torch.device("cpu")
BATCH = 4


def new_course(path: Path, images: int = 400, **options: Any) -> Course:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
    return Course(
        path=path,
        module=module,
        total_images=images,
        batch_size=BATCH,
        rate=0.05,
        device=CPU,
        **{"warmup_images": 20} | options,
    )


def advance(course: Course, steps: int) -> None:
    """So many steps on examples that depend on the images seen alone; ends as a stop would."""
    for taken, images in enumerate(course.steps()):
        if taken == steps:
            break
        rng = torch.Generator().manual_seed(images)
        inputs = torch.randn(BATCH, 3, generator=rng)
        loss = (course.module(inputs) - inputs[:, :2].sin()).square().mean()
        course.apply(loss, doubled=2 * loss)


def state_of(course: Course) -> dict[str, Tensor]:
    parts = {"module": course.module, "average": course.average}
    return {
        f"{part}.{name}": value.clone()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def test_two_steps_and_two_more_are_four(tmp_path: Path) -> None:
    whole = new_course(tmp_path / "whole.pt")
    advance(whole, 4)
    advance(new_course(tmp_path / "halves.pt"), 2)
    resumed = new_course(tmp_path / "halves.pt")
    assert resumed.images == 2 * BATCH
    advance(resumed, 2)
    assert resumed.images == whole.images == 4 * BATCH
    expected, found = state_of(whole), state_of(resumed)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    # Losses are kept in a checkpoint as Python's floats, which hold float32 exactly.
    assert resumed.losses == whole.losses


def test_training_learns_and_the_average_follows(tmp_path: Path) -> None:
    course = new_course(tmp_path / "a.pt", images=4000)
    advance(course, 1)
    first = course.losses["loss"]
    advance(course, 900)
    assert course.losses["loss"] < 0.2 * first
    assert course.losses["doubled"] == pytest.approx(2 * course.losses["loss"], rel=1e-5)
    inputs = torch.randn(256, 3)
    error = (course.average(inputs) - inputs[:, :2].sin()).square().mean()
    assert float(error.detach()) < 0.2 * first


def test_an_interrupted_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    course = new_course(path)
    advance(course, 2)
    before = path.read_bytes()

    def killed(state: object, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            course.save()
    assert path.read_bytes() == before
    assert new_course(path).images == 2 * BATCH


def test_a_stop_within_a_step_keeps_the_steps_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    course = new_course(path)
    advance(course, 3)

    def train() -> None:
        for _ in course.steps():
            raise KeyboardInterrupt

    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        train()
    assert new_course(path).images == 3 * BATCH


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    course = new_course(path)
    advance(course, 2)
    before = path.read_bytes()
    path.with_suffix(".partial").symlink_to("/dev/full")
    with pytest.raises(RecipeError, match="cannot write .*a.pt: .*make room on the disk"):
        course.save()
    assert path.read_bytes() == before
    assert not path.with_suffix(".partial").exists()


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_cut_off_checkpoint_is_named_with_what_to_do(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.pt"
    advance(new_course(path), 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(RecipeError, match="a.pt is damaged .*a.stable.pt"):
        new_course(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    advance(new_course(path), 1)
    with pytest.raises(RecipeError, match="belongs to another model .*--setting"):
        Course(
            path=path,
            module=nn.Linear(3, 2),
            total_images=8,
            batch_size=BATCH,
            rate=0.1,
            device=CPU,
        )


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    course = new_course(path)
    advance(course, 2)
    before = path.read_bytes()
    parameter = next(course.module.parameters())
    course.apply(parameter.sum() * float("nan"))
    with pytest.raises(RecipeError, match="after 12 images .*nan.* is not finite"):
        course.save()
    assert path.read_bytes() == before


def test_the_rate_warms_up_stays_and_falls_to_zero(tmp_path: Path) -> None:
    course = new_course(tmp_path / "a.pt", images=1000, warmup_images=100)
    assert course.rate_factor(0) == pytest.approx(BATCH / 100)
    assert course.rate_factor(46) == pytest.approx(0.5)
    assert course.rate_factor(96) == course.rate_factor(int(1000 * DECAY_FROM)) == 1.0
    assert course.rate_factor(860) == pytest.approx(0.5)
    assert course.rate_factor(1000) == 0.0


def test_the_checkpoint_before_the_rate_falls_is_kept_for_longer_courses(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    advance(new_course(path, images=100), 30)
    path.with_suffix(".stable.pt").replace(path)
    longer = new_course(path, images=200)
    assert longer.images == 72
    assert longer.rate_factor(longer.images) == 1.0


def test_a_course_ends_at_its_deadline_and_saves(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    course = new_course(path, deadline=time.monotonic() - 1)
    advance(course, 5)
    assert course.images == 0 and path.is_file() and not course.done


def test_timesteps_of_a_batch_hardly_depend_on_chance() -> None:
    """Stratified: sorted, two batches differ by less than the width of their strata."""
    for count in (7, 64):
        first, second = (stratified_timesteps(count, 1000, CPU).sort().values for _ in range(2))
        assert int(first.min()) >= 0 and int(first.max()) < 1000
        # The widest strata are the outer ones of the logit-normal part: a seventh of seven.
        assert int((first - second).abs().max()) <= (360 if count == 7 else 120)


def test_most_timesteps_are_from_the_noisier_half_and_none_is_left_out() -> None:
    steps = torch.cat([stratified_timesteps(64, 1000, CPU) for _ in range(400)])
    # Four fifths logit-normal with median sigmoid(0.6), one fifth even.
    expected = 0.8 * (1 - Normal(0.0, 1.0).cdf(torch.tensor(-0.6))) + 0.2 * 0.5
    # 25,600 draws in strata: the share is good to better than 0.01.
    assert abs(float((steps >= 500).float().mean()) - float(expected)) < 0.01
    assert torch.histc(steps.float(), bins=50, min=0, max=1000).min() > 0


@pytest.fixture(scope="module")
def composer(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    icons = toy_icons(tmp_path_factory.mktemp("pack"))
    return Composer(for_training(icons), TINY.image_size)


def drawn_batches(composer: Composer, count: int) -> list[Tensor]:
    batches = composed_batches(composer, 16, 0, CPU)
    return [to_tensor(next(batches).pixels, CPU) for _ in range(count)]


def test_batches_are_the_compositions_in_order(composer: Composer) -> None:
    batches = composed_batches(composer, 3, 10, CPU)
    for first in (10, 13):
        batch = next(batches)
        for place in range(3):
            expected = composer.compose(first + place)
            np.testing.assert_array_equal(batch.pixels[place], expected.pixels)
            assert batch.captions[place] == expected.caption


@torch.no_grad()
def test_normalization_changes_latents_and_not_the_pictures(composer: Composer) -> None:
    torch.manual_seed(0)
    vae: Any = new_autoencoder(TINY).eval()
    for parameter in vae.parameters():  # away from the zeros that residual branches begin with
        parameter.add_(0.05 * torch.randn_like(parameter))
    batches = drawn_batches(composer, 3)
    before = [vae.encode(batch).latent_dist for batch in batches]
    pictures = [vae.decode(posterior.mean).sample for posterior in before]
    deviation = torch.cat([posterior.mean for posterior in before]).std(dim=(0, 2, 3))
    assert float((deviation - 1).abs().min()) > 0.01, "nothing to normalize"
    normalized(vae, batches)
    after = [vae.encode(batch).latent_dist for batch in batches]
    latents = torch.cat([posterior.mean for posterior in after])
    # float32 sums over 48 x 64 latents a channel
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=1e-5)
    for old, new, expected in zip(before, after, pictures, strict=True):
        # Two linear layers in other order of rounding; pictures are of magnitude 1.
        torch.testing.assert_close(vae.decode(new.mean).sample, expected, rtol=0, atol=1e-4)
        # Samples change with their means: the noise is scaled alike.
        scaled = old.std / deviation[:, None, None]
        torch.testing.assert_close(new.std, scaled, rtol=1e-4, atol=0)


def test_psnr_is_the_textbooks() -> None:
    pictures = torch.zeros(2, 3, 4, 4)
    decoded = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    # Range 2: 20 log10(2 / error) is 20 and 40 dB.
    assert float(psnr(decoded, pictures)) == pytest.approx(30.0, abs=1e-4)


class CountedVae(nn.Module):
    """Encodes each picture as its mean colour everywhere; counts the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = 0

    def encode(self, pictures: Tensor) -> Any:
        self.pictures += len(pictures)
        side = TINY.latent_size
        colours = pictures.mean(dim=(2, 3), keepdim=True).expand(-1, 3, side, side)
        mean = torch.cat([colours, colours[:, :1]], dim=1)
        distribution = type("Distribution", (), {"mean": mean})()
        return type("Encoded", (), {"latent_dist": distribution})()


class CountedTokenizer:
    """Ids that say how long a caption is."""

    def __call__(self, captions: list[str], **_: object) -> Any:
        ids = torch.zeros(len(captions), TINY.max_tokens, dtype=torch.int64)
        ids[:, 0] = torch.tensor([len(caption) for caption in captions])
        return type("Encoding", (), {"input_ids": ids})()


def new_pool(folder: Path, composer: Composer, vae: CountedVae) -> LatentPool:
    setting = replace(TINY, pool_images=384)
    tokenizer: Any = CountedTokenizer()
    autoencoder: Any = vae
    return LatentPool(setting, folder, composer, autoencoder, tokenizer, CPU)


def test_the_pool_grows_with_the_training_and_encodes_each_chunk_once(
    tmp_path: Path, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_module, "_CHUNK_IMAGES", 64)
    vae = CountedVae()
    pool = new_pool(tmp_path, composer, vae)
    pool.grow_for(0)
    assert len(pool) == vae.pictures == 4 * 64
    pool.grow_for(5 * 64)
    pool.grow_for(5 * 64)
    assert len(pool) == vae.pictures == 5 * 64
    pool.grow_for(10**6)
    assert len(pool) == vae.pictures == 384, "no more than the setting says"

    again, unused = new_pool(tmp_path, composer, CountedVae()), CountedVae()
    again._autoencoder = unused
    again.grow_for(10**6)
    assert len(again) == 384 and unused.pictures == 0
    first, second = (one.draw(500, np.random.default_rng(3)) for one in (pool, again))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_pool_draws_latents_with_their_own_words(tmp_path: Path, composer: Composer) -> None:
    pool = new_pool(tmp_path, composer, CountedVae())
    pool.grow_for(0)
    latents, ids = pool.draw(50, np.random.default_rng(1))
    composed = [composer.compose(index) for index in range(len(pool))]
    colours = np.stack([one.pixels.mean(axis=(0, 1)) for one in composed]) / 127.5 - 1
    lengths = np.array([len(one.caption) for one in composed])
    for latent, row in zip(latents, ids, strict=True):
        distance = np.abs(colours - latent[:3, 0, 0].float().numpy()).max(axis=1)
        # float16 of numbers up to 1: 5e-4
        assert int(row[0]) in lengths[distance < 1e-3]


def test_damaged_and_strange_chunks_are_named(tmp_path: Path, composer: Composer) -> None:
    new_pool(tmp_path, composer, CountedVae()).grow_for(0)
    path = tmp_path / "0000.safetensors"
    assert set(load_file(path)) == {"latents", "input_ids"}
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(RecipeError, match="0000.safetensors is damaged .*it is made anew"):
        new_pool(tmp_path, composer, CountedVae()).grow_for(0)
    path.write_bytes(whole.replace(b'"input_ids"', b'"input_idx"', 1))
    with pytest.raises(RecipeError, match="input_idx.*expected .*it is made anew"):
        new_pool(tmp_path, composer, CountedVae()).grow_for(0)


def test_a_state_that_travels_keeps_weights_average_and_place(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    course = new_course(path, images=4000)
    advance(course, 300)
    state = torch.load(path, weights_only=True)
    travelled = expanded(compacted(state))
    assert "optimizer" not in travelled
    for name, value in state["module"].items():
        # float16 has 11 bits
        torch.testing.assert_close(travelled["module"][name], value, rtol=2**-11, atol=1e-7)
        difference = (state["average"][name] - value).abs().max()
        error = (travelled["average"][name] - state["average"][name]).abs().max()
        # Half of a 127th of the largest difference; what float16 rounds off is in the difference.
        assert float(error) <= float(difference) / 127 + 1e-6

    torch.save(travelled, path)
    resumed = new_course(path, images=4000)
    assert resumed.images == course.images and resumed.losses == course.losses
    # The optimizer is new, so the rate warms up again.
    assert resumed.rate_factor(resumed.images) == pytest.approx(BATCH / 20)
    assert resumed.rate_factor(resumed.images + 20) == 1.0
    advance(resumed, 300)
    assert resumed.losses["loss"] < 1.5 * course.losses["loss"]


def test_a_packed_state_goes_on_elsewhere(tmp_path: Path) -> None:
    here, there = tiny_recipe(tmp_path / "here"), tiny_recipe(tmp_path / "there")
    with pytest.raises(RecipeError, match="no training in .* to pack yet"):
        pack_state(here, tmp_path / "state")
    course = new_course(here.folder / "denoiser.pt")
    advance(course, 3)
    (here.folder / "vae").mkdir()
    (here.folder / "vae" / "config.json").write_text("{}")
    files = pack_state(here, tmp_path / "state", part_bytes=8_000)
    assert len(files) > 2
    assert all(path.stat().st_size <= 8_000 for path in files)
    unpack_state(there, tmp_path / "state")
    assert (there.folder / "vae" / "config.json").read_text() == "{}"
    resumed = new_course(there.folder / "denoiser.pt")
    assert resumed.images == 3 * BATCH
    for name, value in course.module.state_dict().items():
        torch.testing.assert_close(resumed.module.state_dict()[name], value, rtol=2**-11, atol=0)

    with pytest.raises(RecipeError, match="is not empty; move it away"):
        unpack_state(there, tmp_path / "state")
    with pytest.raises(RecipeError, match="more than 4 files of 100"):
        pack_state(here, tmp_path / "small", part_bytes=100)


def test_a_packed_state_that_is_damaged_or_of_another_setting_is_refused(tmp_path: Path) -> None:
    here, there = tiny_recipe(tmp_path / "here"), tiny_recipe(tmp_path / "there")
    advance(new_course(here.folder / "denoiser.pt"), 1)
    files = pack_state(here, tmp_path / "state")
    other = tiny_recipe(tmp_path / "there", replace(TINY, name="other"))
    with pytest.raises(RecipeError, match="state of --setting tiny, not of other"):
        unpack_state(other, tmp_path / "state")
    part = files[-1]
    content = part.read_bytes()
    part.write_bytes(content[:-1] + b"x")
    with pytest.raises(RecipeError, match="state.00 is damaged; copy it again"):
        unpack_state(there, tmp_path / "state")
    part.unlink()
    with pytest.raises(RecipeError, match="holds no whole state"):
        unpack_state(there, tmp_path / "state")
    assert not there.folder.exists()
