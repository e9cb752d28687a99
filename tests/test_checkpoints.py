"""Checkpoints: a run goes on bit for bit, and only as the run that it was."""

import dataclasses
import errno
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import learning_setup
from tests.learning_setup import OPTIONS, SIZE, identity_of
from trainer.checkpoints import read_checkpoint, write_checkpoint
from trainer.errors import CheckpointError
from trainer.fingerprint import model_fingerprint
from trainer.images import TrainingImages
from trainer.learning import learn
from trainer.model import DiffusionModel, load_model
from trainer.options import LearnOptions
from trainer.run import LearnState

# Fixtures.
model_path, model, own_model, images = (
    learning_setup.model_path,
    learning_setup.model,
    learning_setup.own_model,
    learning_setup.images,
)


def _tensors(state: LearnState) -> dict[str, Tensor]:
    values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def test_a_resumed_run_is_the_same_bit_for_bit(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    options = LearnOptions(steps=40, batch_size=2, eval_every=15, num_vectors=2)
    identity = identity_of(model, images, options)
    states = list(learn(model, images, options))
    write_checkpoint(tmp_path / "checkpoint", states[20], identity)
    resumed = list(
        learn(
            model, images, options, resume_from=read_checkpoint(tmp_path / "checkpoint", identity)
        )
    )
    assert [state.step for state in resumed] == list(range(21, 41))
    for state, expected in zip(resumed, states[21:], strict=True):
        found, wanted = _tensors(state), _tensors(expected)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert state.loss == expected.loss
        assert state.evaluation_loss == expected.evaluation_loss
        assert state.best_step == expected.best_step


def test_checkpoint_of_the_first_state_can_be_read(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    identity = identity_of(model, images, OPTIONS)
    first = next(learn(model, images, OPTIONS))
    write_checkpoint(tmp_path / "checkpoint", first, identity)
    read = read_checkpoint(tmp_path / "checkpoint", identity)
    assert math.isnan(read.loss) and torch.equal(read.vectors, first.vectors)


def test_checkpoint_of_another_run_is_refused_and_says_what_differs(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    identity = identity_of(model, images, OPTIONS)
    write_checkpoint(path, next(learn(model, images, OPTIONS)), identity)
    seven = {**identity.options, "seed": 7}
    others = {
        "seed is 7, it was 0": dataclasses.replace(identity, options=seven),
        r"images differ \(1 now, 3 then\)": dataclasses.replace(identity, images=("f" * 64,)),
        "the masks differ": identity_of(
            model, dataclasses.replace(images, masks=torch.ones(3, 1, SIZE, SIZE)), OPTIONS
        ),
        "the captions differ": identity_of(
            model, dataclasses.replace(images, captions=((), ("a {}",), ())), OPTIONS
        ),
        "placeholder_token is '<dog>', it was '<cat>'": dataclasses.replace(
            identity, placeholder_token="<dog>"
        ),
        "model is another one": dataclasses.replace(identity, model="0" * 64),
    }
    for message, other in others.items():
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path, other)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_fine_tuned_model_is_another_model(
    own_model: DiffusionModel, images: TrainingImages, part: str
) -> None:
    before = identity_of(own_model, images, OPTIONS).model
    assert identity_of(own_model, images, OPTIONS).model == before
    weight = max(getattr(own_model, part).parameters(), key=Tensor.numel)
    with torch.no_grad():
        weight[(-1,) * weight.ndim] += 1e-3
    assert identity_of(own_model, images, OPTIONS).model != before


def test_other_configs_make_another_model(own_model: DiffusionModel) -> None:
    found = {model_fingerprint(own_model)}
    scheduler_config = {**own_model.scheduler_config, "beta_end": 0.013}
    found.add(model_fingerprint(dataclasses.replace(own_model, scheduler_config=scheduler_config)))
    own_model.unet.register_to_config(norm_eps=1e-4)
    found.add(model_fingerprint(own_model))
    own_model.text_encoder.config.hidden_act = "gelu"
    found.add(model_fingerprint(own_model))
    own_model.tokenizer.add_tokens(["<new>"])
    found.add(model_fingerprint(own_model))
    assert len(found) == 5


def test_fingerprint_depends_neither_on_place_nor_on_name(
    model: DiffusionModel, model_path: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(model_path, tmp_path / "elsewhere")
    assert model_fingerprint(load_model(copy)) == model_fingerprint(model)


def test_fingerprint_reads_scalars_and_bfloat16(own_model: DiffusionModel) -> None:
    own_model.unet.register_buffer("scalar", torch.tensor(1.0, dtype=torch.bfloat16))
    one = model_fingerprint(own_model)
    own_model.unet.register_buffer("scalar", torch.tensor(2.0, dtype=torch.bfloat16))
    assert model_fingerprint(own_model) != one


def test_damaged_checkpoint_is_an_error_that_names_it(
    model: DiffusionModel, images: TrainingImages, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    identity = identity_of(model, images, OPTIONS)
    write_checkpoint(path, next(learn(model, images, OPTIONS)), identity)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint is not a checkpoint or is damaged"):
            read_checkpoint(path, identity)
    with pytest.raises(CheckpointError, match="without --resume"):
        read_checkpoint(tmp_path / "absent", identity)


def test_failed_write_leaves_the_checkpoint_before(
    model: DiffusionModel,
    images: TrainingImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "checkpoint"
    identity = identity_of(model, images, OPTIONS)
    states = list(learn(model, images, OPTIONS))
    write_checkpoint(path, states[2], identity)

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, states[4], identity)
    assert read_checkpoint(path, identity).step == 2
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
