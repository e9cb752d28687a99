"""A model that optimum exported becomes a bundle that draws what diffusers draws of it.

The export is tests/golden/optimum-tiny.zip, made by optimum itself (tests/golden/README.md).
"""

import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from build_engines import main
from engine.batching.batcher import Batcher, generate
from engine.bundle import MANIFEST, SAMPLERS, Bundle, read_manifest
from engine.concepts import Concept
from engine.errors import OneWordError
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest
from tests.isolated import isolated_command, isolated_environment
from trainer.clip_tokenizer import read_clip_tokenizer
from trainer.onnx_surgery import SurgeryError
from trainer.optimum_folder import ImportRefused
from trainer.optimum_import import import_optimum

GOLDEN = Path(__file__).resolve().parent / "golden" / "optimum-tiny.zip"
SAMPLERS_OF_TESTS, STEPS = ("ddim",), 4
# 8 bits give 58.9 dB; a timestep that is off by one of a thousand, or pooling and words in a wrong
# place, stay below 50.
MIN_PSNR_DB = 55.0


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(GOLDEN) as packed:
        packed.extractall(folder)
    return folder / "optimum-tiny"


@pytest.fixture
def export(golden: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(golden, tmp_path / "export")


@pytest.fixture(scope="module")
def bundle(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "tiny"
    report = import_optimum(golden, output, samplers=SAMPLERS_OF_TESTS, max_steps=STEPS)
    assert max(report.errors.values()) < 1e-6
    return output


def draw(bundle: Path, **fields: Any) -> np.ndarray:
    pipeline = Pipeline.open(bundle)
    batcher = Batcher(pipeline)
    try:
        images, _ = generate(batcher, pipeline.plan(GenerationRequest(**fields)))
    finally:
        batcher.close()
    return images[0].image / 255.0


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((image - reference) ** 2)))


REQUEST = {
    "prompt": "a photo of a cat",
    "negative_prompt": "red",
    "seed": 11,
    "num_inference_steps": STEPS,
    "guidance_scale": 5.0,
}


def test_the_bundle_draws_what_diffusers_draws(bundle: Path, golden: Path) -> None:
    expected = np.load(golden / "expected.npz")["image"]
    assert psnr_db(draw(bundle, **REQUEST), expected) > MIN_PSNR_DB
    other = REQUEST | {"prompt": "a photo of a dog"}
    assert psnr_db(draw(bundle, **other), expected) < MIN_PSNR_DB - 10


def test_images_at_different_steps_share_a_call(bundle: Path) -> None:
    """What a scalar timestep forbids: each row has its own."""
    session = Bundle.open(bundle).open_session("denoiser")
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 8, 6)).astype(np.float32)
    prompts = rng.standard_normal((2, 16, 16)).astype(np.float32)
    timesteps = np.array([0.5, 900.25], np.float32)
    feeds = {"latents": latents, "timestep": timesteps, "prompt_embeds": prompts}
    both = session.run(feeds)["noise_pred"]
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in feeds.items()}
        alone = session.run(one)["noise_pred"]
        np.testing.assert_allclose(both[row : row + 1], alone, atol=1e-5)
    same = session.run(feeds | {"timestep": np.full(2, 0.5, np.float32)})["noise_pred"]
    assert np.abs(same[1] - both[1]).max() > 1e-2


def test_a_word_of_two_vectors_is_heard_and_pooled_at_eos(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    text = opened.manifest.text
    vectors = np.random.default_rng(0).normal(size=(2, text.dim)).astype(np.float32)
    word = Concept(
        placeholder_token="<x>",
        learned_embeddings=vectors,
        embedding_fingerprint=text.embedding_fingerprint,
    )
    pipeline = Pipeline.open(bundle)
    read = pipeline.reader.read("a <x>", [word])
    found = opened.open_session("text_encoder").run(
        {"inputs_embeds": read.inputs_embeds, "eos_index": read.eos_index}
    )
    hidden = found["prompt_embeds"]
    np.testing.assert_array_equal(found["pooled"], hidden[[0], read.eos_index])
    spelled = pipeline.reader.read("a cat", [])
    other = opened.open_session("text_encoder").run(
        {"inputs_embeds": spelled.inputs_embeds, "eos_index": spelled.eos_index}
    )
    assert np.abs(hidden - other["prompt_embeds"]).max() > 1e-2


def test_the_tokenizer_is_transformers_own(golden: Path) -> None:
    tokenizer = read_clip_tokenizer(golden / "tokenizer").tokenizer
    expected = np.load(golden / "expected.npz")
    ids: list[int] = []
    for sample in expected["samples"]:
        ids += [*tokenizer.encode(str(sample), add_special_tokens=False).ids, -1]
    assert ids == expected["ids"].tolist()


def test_the_manifest_says_what_the_graphs_take(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    for component in manifest.components:
        Bundle.open(bundle).open_session(component)  # compares the inputs
    shapes = {t.name: t.shape for t in manifest.components["denoiser"].inputs}
    assert shapes["timestep"] == ["rows"]
    assert manifest.latents.scaling_factor == 0.3 and manifest.latents.shift_factor == 0.1
    assert (manifest.text.bos_token_id, manifest.text.eos_token_id) == (521, 522)
    graph = onnx.load(bundle / "text_encoder.onnx").graph
    assert all(tensor.dims[:1] != [manifest.text.vocab_size] for tensor in graph.initializer)


def test_a_bundle_is_made_without_torch_where_tables_are_taken_over(
    bundle: Path, golden: Path, tmp_path: Path
) -> None:
    words = ("-m", "build_engines", "--from-onnx", golden, "--output", tmp_path / "out")
    subprocess.run(
        isolated_command(*words, "--samplers-from", bundle),
        env=isolated_environment(tmp_path),
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert (tmp_path / "out" / SAMPLERS).read_bytes() == (bundle / SAMPLERS).read_bytes()
    ours, theirs = (Bundle.open(path) for path in (tmp_path / "out", bundle))
    for name in ("token_embedding", "latent_rgb"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_tables_of_another_schedule_are_refused(bundle: Path, export: Path, tmp_path: Path) -> None:
    edit(export / "scheduler" / "scheduler_config.json", beta_end=0.02)
    with pytest.raises(ImportRefused, match="another schedule: beta_end .0.012, this model"):
        import_optimum(export, tmp_path / "out", samplers_from=bundle)


def test_what_was_built_is_left_alone(bundle: Path, golden: Path) -> None:
    before = (bundle / MANIFEST).stat().st_mtime_ns
    report = import_optimum(golden, bundle, samplers=SAMPLERS_OF_TESTS, max_steps=STEPS)
    assert not report.errors
    assert (bundle / MANIFEST).stat().st_mtime_ns == before


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spoil_graph(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save_model(model, path)


def _other_weight(model: onnx.ModelProto) -> None:
    """The largest weight is not what it was: as after a cut in a wrong place."""
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = numpy_helper.to_array(tensor) * 1.5
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def test_a_graph_that_computes_something_else_is_not_published(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import optimum_graphs

    save = optimum_graphs.save_graph

    def save_spoiled(model: onnx.ModelProto, path: Path) -> None:
        if path.name == "text_encoder.onnx":
            _other_weight(model)
        save(model, path)

    monkeypatch.setattr(optimum_graphs, "save_graph", save_spoiled)
    with pytest.raises(ImportRefused, match="text_encoder is off by .* nothing was published"):
        import_optimum(golden, tmp_path / "out", samplers=SAMPLERS_OF_TESTS, max_steps=STEPS)
    assert list(tmp_path.iterdir()) == []


def _fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def _two_look_ups(model: onnx.ModelProto) -> None:
    (look_up,) = (n for n in model.graph.node if "token_embedding.weight" in "".join(n.input))
    again = helper.make_node("Gather", list(look_up.input), ["again"])
    model.graph.node.insert(list(model.graph.node).index(look_up), again)


def _timestep_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Neg", ["timestep"], ["elsewhere"]))


@pytest.mark.parametrize(
    ("graph", "change", "reason"),
    [
        ("unet", _fixed_batch, "must be dynamic"),
        ("vae_decoder", _fixed_batch, "must be dynamic"),
        ("text_encoder", _two_look_ups, "in 2 tables"),
        ("unet", _timestep_elsewhere, "goes to 2 nodes"),
    ],
)
def test_graphs_that_optimum_does_not_write_are_refused(
    export: Path, tmp_path: Path, graph: str, change: Any, reason: str
) -> None:
    spoil_graph(export / graph / "model.onnx", change)
    with pytest.raises((ImportRefused, SurgeryError), match=reason):
        import_optimum(export, tmp_path / "out", samplers=SAMPLERS_OF_TESTS, max_steps=STEPS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "is a StableDif",
        ),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type 'sam"),
        ("text_encoder/config.json", {"vocab_size": 9}, "the tokenizer has 523 tokens"),
    ],
)
def test_models_that_cannot_be_served_are_refused(
    export: Path, tmp_path: Path, file: str, fields: dict[str, object], reason: str
) -> None:
    edit(export / file, **fields)
    with pytest.raises(ImportRefused, match=reason):
        import_optimum(export, tmp_path / "out")


@pytest.mark.parametrize("file", ["unet/model.onnx", "tokenizer/vocab.json", "model_index.json"])
@pytest.mark.parametrize("content", [None, b"", b"\x08\x07{"])
def test_broken_and_missing_files_are_named(
    export: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    (export / file).unlink()
    if content is not None:
        (export / file).write_bytes(content)
    with pytest.raises(OneWordError, match=file.split("/")[0]):
        import_optimum(export, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_bundle_is_not_overwritten(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ImportRefused, match="not a bundle; it is not overwritten"):
        import_optimum(golden, tmp_path)


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--from-onnx", "x", "--output", "y", "--precision", "fp16"],
        ["--from-onnx", "x", "--output", "y", "--target", "rtx:sm86"],
        ["--model", "x", "--output", "y", "--samplers-from", "z"],
        ["--output", "y"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
    assert "usage" in capsys.readouterr().err
