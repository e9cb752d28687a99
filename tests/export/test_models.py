"""Models that are refused, and forms of models that are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from huggingface_hub import file_download

from tests.export_setup import edit_json
from trainer.model import ModelError, load_model

FLUX = {"_class_name": "FluxPipeline", "text_encoder_2": ["transformers", "T5EncoderModel"]}


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", FLUX, "a FluxPipeline .text_encoder_2 T5EncoderModel.; supported: "),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "r T5Encoder"),
        ("model_index.json", {"unet": None}, "unet is missing"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels and gives 4.*inpainting"),
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds=10"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "supported: epsilon, v"),
    ],
    ids=["flux", "t5", "no-unet", "inpainting", "classes", "lcm", "sample"],
)
def test_unsupported_models_are_refused_by_what_they_have(
    model_copy: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit_json(model_copy / file, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(model_copy)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", None, "has no model_index.json"),
        ("model_index.json", b"[]", "cannot read the config of .*: it is a JSON list, no object"),
        ("unet/config.json", b"[]", "cannot read the unet config of .*: it is a JSON list"),
        ("scheduler/scheduler_config.json", b"[]", "the scheduler config of .*: it is a JSON list"),
        ("unet/config.json", None, "cannot read the unet config"),
        ("unet/diffusion_pytorch_model.safetensors", b"\0" * 64, "the weights of unet"),
        ("vae/diffusion_pytorch_model.safetensors", None, "the weights of vae"),
        ("text_encoder/model.safetensors", b"", "the weights of text_encoder"),
        ("tokenizer/tokenizer.json", b"{", "cannot read the tokenizer"),
    ],
)
def test_broken_models_are_refused_by_what_is_broken(
    model_copy: Path, file: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (model_copy / file).unlink()
    else:
        (model_copy / file).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(model_copy)


# diffusers hands on an argument that huggingface_hub does not take any more.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_a_hub_that_does_not_answer_is_an_error_of_one_line_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(file_download, "get_hf_file_metadata", unreachable)
    with pytest.raises(ModelError) as error:
        load_model("no-such-owner/no-such-name")
    message = str(error.value)
    assert "(no such folder here, so taken for a hub id): the Hugging Face hub could not" in message
    assert message.endswith("connect, or give the folder of a downloaded model")


def test_an_answer_of_the_hub_is_passed_on_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise OSError("owner/name is not a valid model identifier\nand a page of advice")

    monkeypatch.setattr(DiffusionPipeline, "load_config", answer)
    with pytest.raises(ModelError, match=r"hub id\): owner/name is not a valid model identifier$"):
        load_model("owner/name")


# diffusers tells of the correction, and of the missing safety checker.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("absent", ["steps_offset", "clip_sample", None])
def test_the_scheduler_config_is_that_of_the_pipeline(
    model_copy: Path, absent: str | None, scheduler: str
) -> None:
    path = model_copy / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), "_class_name": scheduler}
    config.pop(absent, None)
    path.write_text(json.dumps(config))
    edit_json(model_copy / "model_index.json", scheduler=["diffusers", scheduler])
    load_pipeline: Any = StableDiffusionPipeline.from_pretrained
    expected = dict(load_pipeline(model_copy).scheduler.config)
    found = load_model(model_copy).scheduler_config
    # What a correction has changed is no default any more, or from_config would undo it.
    defaults = set(expected.pop("_use_default_values", ())) - {"steps_offset", "clip_sample"}
    assert set(found.pop("_use_default_values", ())) == defaults
    assert found == expected
    assert found["steps_offset"] == 1 and not found.get("clip_sample", False)


@pytest.mark.parametrize("name", ["./nothing/here", "/no/such/folder", "a/b/c", "nothing"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_model(name)


def test_weights_of_the_fp16_variant_are_found(model_copy: Path) -> None:
    expected = load_model(model_copy)
    for part in ("unet", "vae", "text_encoder"):
        for weights in (model_copy / part).glob("*.safetensors"):
            weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    found = load_model(model_copy)
    torch.testing.assert_close(found.unet.state_dict(), expected.unet.state_dict())
    torch.testing.assert_close(found.token_embedding, expected.token_embedding)


def test_a_tokenizer_of_vocabulary_and_merges_alone_is_read(model_copy: Path) -> None:
    expected = load_model(model_copy).tokenizer
    bpe = json.loads((model_copy / "tokenizer" / "tokenizer.json").read_text())["model"]
    (model_copy / "tokenizer" / "tokenizer.json").unlink()
    (model_copy / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (model_copy / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    text = "a photo of dogs, IN the morning"
    assert load_model(model_copy).tokenizer(text).input_ids == expected(text).input_ids
