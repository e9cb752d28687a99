"""From a diffusers folder to a bundle: what is in it, that it is right, and what is refused."""

import ast
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from huggingface_hub import file_download
from safetensors.numpy import load_file
from torch import Tensor, nn

import build_engines
from engine.bundle import COMPONENTS, MANIFEST, Bundle, read_manifest
from engine.concepts import Concept
from engine.fingerprint import embedding_fingerprint
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest
from engine.sessions import OnnxSession
from tests.tiny_model import make_tiny_model
from trainer import build_key, compile_plans, export, parity, sampler_tables
from trainer.export import BuildReport, build_bundle
from trainer.model import ModelError, load_model
from trainer.onnx_graphs import (
    ExportError,
    Graph,
    VaeDecoder,
    VaeEncoder,
    _check_inputs,
    export_graph,
    graphs_of,
)
from trainer.parity import ParityError, component_errors, draw_with_diffusers, psnr_db
from trainer.previews import FINE, fit_latent_rgb, shrunken
from trainer.sources import ROOT, digest_of_sources
from trainer.staging import remove_abandoned, staged_folder

EMOJI_MODEL = Path(__file__).resolve().parent.parent / "models" / "emoji"


def build(model: Path, output: Path, **options: Any) -> BuildReport:
    """A bundle with one sampler of few steps: the tables have tests of their own."""
    return build_bundle(model, output, samplers=["ddim"], max_steps=8, **options)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def report(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    return build(tiny_model, tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def bundle_copy(report: BuildReport, tmp_path: Path) -> Path:
    return Path(shutil.copytree(report.path, tmp_path / "bundle"))


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What is in a bundle


def test_every_axis_of_a_request_is_dynamic(report: BuildReport) -> None:
    inputs = {
        name: {tensor.name: (tensor.dtype, tensor.shape) for tensor in spec.inputs}
        for name, spec in report.manifest.components.items()
    }
    assert inputs == {
        "text_encoder": {
            "inputs_embeds": ("float32", ["batch", 20, 24]),
            "eos_index": ("int64", ["batch"]),
        },
        "denoiser": {
            "latents": ("float32", ["rows", 4, "height", "width"]),
            "timestep": ("float32", ["rows"]),
            "prompt_embeds": ("float32", ["rows", "tokens", 24]),
        },
        "vae_decoder": {"latents": ("float32", ["batch", 4, "height", "width"])},
        "vae_encoder": {"images": ("float32", ["batch", 3, "height", "width"])},
    }


def test_the_manifest_says_what_the_model_is(report: BuildReport, tiny_model: Path) -> None:
    manifest, model = report.manifest, load_model(tiny_model)
    assert (manifest.model_name, manifest.prediction_type) == ("tiny", "epsilon")
    assert (manifest.text.max_tokens, manifest.text.dim) == (20, 24)
    latents = manifest.latents
    # Two pixels a latent, two halvings in the UNet: 8; trained at 12 latents: 24 pixels.
    assert (latents.scale_factor, latents.size_multiple, latents.default_size) == (2, 8, 24)
    assert latents.scaling_factor == 0.3
    table = load_file(report.path / "token_embedding.safetensors")["token_embedding"]
    np.testing.assert_array_equal(table, model.token_embedding.numpy())
    little_endian = table.astype("<f4").tobytes(order="C")
    assert manifest.text.embedding_fingerprint == hashlib.sha256(little_endian).hexdigest()
    assert manifest.text.embedding_fingerprint == embedding_fingerprint(table.astype(">f4"))


def test_the_tokenizer_neither_cuts_nor_pads(report: BuildReport, tiny_model: Path) -> None:
    tokenizer = Bundle.open(report.path).tokenizer
    reference = load_model(tiny_model).tokenizer
    text = "A photo of dogs, in the morning; " * 4
    expected = reference(text, add_special_tokens=False, truncation=False).input_ids
    assert len(expected) > 20
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert tokenizer.encode("", add_special_tokens=False).ids == []


def test_the_runtime_draws_what_diffusers_draws(report: BuildReport, tiny_model: Path) -> None:
    model = load_model(tiny_model)
    rng = np.random.default_rng(3)
    concept = Concept(
        placeholder_token="<new>",
        # As long as the table's own rows times 30: a tiny random encoder hears no less.
        learned_embeddings=rng.standard_normal((3, 24)).astype(np.float32) * 0.6,
    )
    request = GenerationRequest(
        prompt="the red <new> in a photo",
        concepts=(concept,),
        width=32,
        height=40,
        seed=11,
        num_inference_steps=5,
        guidance_scale=6.0,
    )
    pipeline = Pipeline.open(report.path)
    images = pipeline.begin(pipeline.plan(request))
    while not images[0].is_done:
        pipeline.step(images)
    image = pipeline.decode(images)[0] / 255.0
    # Rounding to 8 bits alone gives 58.9 dB; the rest is float32 in another order.
    assert psnr_db(image, draw_with_diffusers(model, request)) > 55
    other = Concept(placeholder_token="<new>", learned_embeddings=-concept.learned_embeddings)
    changed = dataclasses.replace(request, concepts=(other,))
    assert psnr_db(image, draw_with_diffusers(model, changed)) < 45


def test_parity_is_on_record(report: BuildReport) -> None:
    recorded = json.loads((report.path / "parity.json").read_text())
    assert report.parity is not None and set(recorded["max_relative_error"]) == set(COMPONENTS)
    assert recorded["image_psnr_db"] == report.parity.image_psnr_db
    for component, errors in recorded["max_relative_error"].items():
        # Never exactly equal: equality would mean that nothing was compared.
        assert 0 < max(errors.values()) < recorded["limits"]["max_relative_error"][component]


def test_float16_bundle_is_half_inside_and_passes_the_gate(
    tiny_model: Path, tmp_path: Path, report: BuildReport
) -> None:
    half = build(tiny_model, tmp_path / "half", precision="fp16")
    dtypes = {
        tensor.name: tensor.dtype
        for spec in half.manifest.components.values()
        for tensor in (*spec.inputs, *spec.outputs)
    }
    assert dtypes.pop("timestep") == "float32" and dtypes.pop("eos_index") == "int64"
    assert set(dtypes.values()) == {"float16"}
    assert half.parity is not None and half.parity.image_psnr_db > 50
    # Float16 is seen in the figures: they are those of the graphs, not of the reference.
    assert max(half.parity.max_relative_error["denoiser"].values()) > 1e-4
    assert half.manifest.build_key != report.manifest.build_key


# The graphs


def test_a_vae_that_overflows_stays_float32_in_a_float16_bundle(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path / "model", force_upcast=True))
    graph = next(graph for graph in graphs_of(model) if graph.name == "vae_decoder")
    spec = export_graph(graph, tmp_path, precision="fp16")
    assert [tensor.dtype for tensor in (*spec.inputs, *spec.outputs)] == ["float32", "float32"]


def test_scaling_and_shift_are_folded_into_the_autoencoder(tiny_model: Path) -> None:
    vae = load_model(tiny_model).vae
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 4, 6, 10, generator=generator)
    images = torch.rand(2, 3, 16, 8, generator=generator) * 2 - 1
    with torch.no_grad():
        decoded = VaeDecoder(vae, 0.3, 0.7)(latents)
        # As diffusers' pipelines with a shifted VAE do (Stable Diffusion 3): z / scale + shift.
        decode: Any = vae.decode
        torch.testing.assert_close(decoded, decode(latents / 0.3 + 0.7).sample)
        mean, std = VaeEncoder(vae, 0.3, 0.7)(images)
        posterior: Any = vae.encode(images, return_dict=False)[0]
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
        sample = posterior.sample(generator=torch.Generator().manual_seed(5))
    # Two roundings of values around 1.
    torch.testing.assert_close(mean + std * noise, (sample - 0.7) * 0.3, rtol=1e-5, atol=1e-6)


def test_external_weights_give_the_same_graph(tiny_model: Path, tmp_path: Path) -> None:
    graph = graphs_of(load_model(tiny_model))[0]
    spec = export_graph(graph, tmp_path, precision="fp32", external_data_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {spec.file, f"{spec.file}.data"}
    assert (tmp_path / spec.file).stat().st_size < (tmp_path / f"{spec.file}.data").stat().st_size
    errors = component_errors(graph, OnnxSession(tmp_path / spec.file))
    assert max(errors.values()) < 1e-5


def test_a_frozen_input_axis_is_refused(report: BuildReport, tiny_model: Path) -> None:
    graph = next(g for g in graphs_of(load_model(tiny_model)) if g.name == "vae_decoder")
    model = onnx.load(report.path / "vae_decoder.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(ExportError, match=r"takes \{'latents': \(2, 4.*must take .*'batch'"):
        _check_inputs(graph, model)


class FrozenBatch(nn.Module):
    """Declares a dynamic batch and reshapes to the one it was traced with."""

    def forward(self, latents: Tensor) -> Tensor:
        return latents.reshape(int(latents.shape[0]), -1).sum(1)


def test_an_axis_frozen_inside_a_graph_is_found_by_the_gate(tmp_path: Path) -> None:
    graph = Graph(
        name="frozen",
        module=FrozenBatch(),
        inputs={"latents": ("batch", 4)},
        outputs={"sums": ("batch",)},
        size_multiple=1,
        max_tokens=8,
    )
    spec = export_graph(graph, tmp_path, precision="fp32")
    with pytest.raises(ParityError, match=r"frozen\.onnx does not run at .*'batch': 1"):
        component_errors(graph, OnnxSession(tmp_path / spec.file))


def test_previews_explain_most_of_what_the_decoder_draws() -> None:
    model = load_model(EMOJI_MODEL)
    weights = fit_latent_rgb(model, seed=0)
    channels = model.vae.config["latent_channels"]
    coarse = torch.randn(4, channels, 4, 4, generator=torch.Generator().manual_seed(99))
    latents = nn.functional.interpolate(coarse, (FINE, FINE), mode="bicubic")
    with torch.no_grad():
        decoder = VaeDecoder(model.vae, model.scaling_factor, model.shift_factor)
        expected = shrunken(decoder(latents), FINE).numpy()
    found = np.tensordot(weights[:-1].T, latents.numpy(), axes=(1, 1)).swapaxes(0, 1)
    found += weights[-1][:, None, None]
    residual = ((found - expected) ** 2).mean()
    variance = ((expected - expected.mean((0, 2, 3), keepdims=True)) ** 2).mean()
    # Other latents than those fitted to; a map that says nothing leaves all of the variance.
    assert residual < 0.15 * variance


# Building again, and failing


def test_a_second_build_touches_nothing(tiny_model: Path, bundle_copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle_copy.rglob("*")}
    again = build(tiny_model, bundle_copy)
    assert not again.was_built and again.seconds == {}
    assert {path: path.stat().st_mtime_ns for path in bundle_copy.rglob("*")} == before


def test_a_damaged_bundle_is_built_again(tiny_model: Path, bundle_copy: Path) -> None:
    expected = content(bundle_copy)
    with (bundle_copy / "vae_decoder.onnx").open("r+b") as file:
        file.write(b"damage")
    assert build(tiny_model, bundle_copy).was_built
    found = content(bundle_copy)
    del expected["parity.json"], expected[MANIFEST]  # holds measured figures, and their hash
    assert expected.items() <= found.items()


def test_other_weights_replace_the_bundle_but_keep_the_sampler_tables(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*_: Any, **__: Any) -> None:
        pytest.fail("the tables of the same scheduler were made again")

    monkeypatch.setattr(export, "build_sampler_tables", must_not_run)
    before = read_manifest(bundle_copy)
    build(make_tiny_model(tmp_path / "other", seed=1), bundle_copy)
    after = Bundle.open(bundle_copy).manifest
    assert after.files["denoiser.onnx"] != before.files["denoiser.onnx"]
    assert after.files["samplers.safetensors"] == before.files["samplers.safetensors"]


def test_a_failed_build_leaves_nothing_behind(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export, "fit_latent_rgb", fail)
    with pytest.raises(OSError, match="disk full"):
        build(tiny_model, tmp_path / "folder" / "within" / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_bundle(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write raises it

    monkeypatch.setattr(export, "fit_latent_rgb", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/bundle'"):
        build(tiny_model, tmp_path / "bundle")


def test_other_code_is_another_build(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return build_key.build_key(load_model(tiny_model), precision="fp32", samplers_key="same")

    before = key()
    assert key() == before
    monkeypatch.setattr(build_key, "digest_of_sources", lambda _: "other code")
    assert key() != before


def test_the_digest_of_sources_is_of_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    before = digest_of_sources(["a.py"], root=tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert digest_of_sources(["a.py"], root=tmp_path) != before


# They say how files are moved and errors are told, not what is in a bundle.
NOT_IN_A_KEY = {"build_job", "errors", "messages", "sampler_pool", "sources", "staging"}


def imported_modules(name: str, found: set[str]) -> set[str]:
    """The modules of `trainer` that one of them imports, and those that they import."""
    if name not in found:
        found.add(name)
        source = ROOT / "trainer" / f"{name}.py"
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer."):
                imported_modules((node.module or "").removeprefix("trainer."), found)
    return found


def test_every_module_of_the_exporter_is_in_a_key() -> None:
    keyed = {*build_key.SOURCES, *sampler_tables._SOURCES, *compile_plans.SOURCES}
    modules = {f"trainer/{name}.py" for name in imported_modules("export", set()) - NOT_IN_A_KEY}
    assert modules == {file for file in keyed if file.startswith("trainer/")}


def test_tables_of_another_override_are_made_again(
    tiny_model: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(bundle_copy)
    spec = sampler_tables.SAMPLERS["ddim"]
    changed = spec._replace(overrides={**spec.overrides, "set_alpha_to_one": True})
    monkeypatch.setattr(sampler_tables, "SAMPLERS", {"ddim": changed})
    # The gate draws with diffusers' own DDIM: it would refuse a sampler that is another.
    monkeypatch.setattr(parity, "MIN_PSNR_DB", {"fp32": 0.0})
    assert build(tiny_model, bundle_copy).was_built
    after = read_manifest(bundle_copy)
    assert after.files["samplers.safetensors"] != before.files["samplers.safetensors"]


def test_the_gate_notices_a_schedule_that_is_off_by_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sampler_tables.SAMPLERS["ddim"]
    changed = spec._replace(overrides={"steps_offset": 0})
    monkeypatch.setattr(sampler_tables, "SAMPLERS", {"ddim": changed})
    with pytest.raises(ParityError, match="dB PSNR"):
        build(tiny_model, tmp_path / "bundle")


# The folder of the bundle


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder with a file, to be replaced."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


def replace(output: Path) -> None:
    with staged_folder(output) as staging:
        (staging / "file").write_text("new")


@pytest.mark.parametrize("interrupted", [1, 2])
def test_an_interruption_between_the_renames_leaves_the_old_folder(
    output: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    calls: list[Path] = []
    rename = os.replace

    def rename_then_interrupt(source: Path, target: Path) -> None:
        rename(source, target)
        calls.append(source)
        if len(calls) == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", rename_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace(output)
    # After the second rename the new folder is there, whole.
    assert (output / "file").read_text() == ("old" if interrupted == 1 else "new")
    assert list(output.parent.iterdir()) == [output]


def test_a_folder_that_cannot_be_put_back_is_put_back_by_the_next_build(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.replace, itertools.count()

    def rename_once(source: Path, target: Path) -> None:
        if next(calls):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", rename_once)
        replace(output)
    assert not output.exists()
    remove_abandoned(output)
    assert (output / "file").read_text() == "old"
    assert list(output.parent.iterdir()) == [output]


def test_what_a_killed_build_left_is_cleared_away_and_a_running_one_is_left(output: Path) -> None:
    for name in (".bundle.building-killed", ".bundle.replaced-killed", ".other.building-killed"):
        (output.parent / name).mkdir()
        (output.parent / name / "file").write_text("")
    with staged_folder(output) as running:
        replace(output)
        assert running.is_dir()
    assert {path.name for path in output.parent.iterdir()} == {"bundle", ".other.building-killed"}


@pytest.mark.parametrize("name", ["link", "."])
def test_outputs_of_another_name_are_resolved(
    output: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (output.parent / "link").symlink_to(output)
    monkeypatch.chdir(output if name == "." else output.parent)
    replace(Path(name))
    assert (output / "file").read_text() == "new"
    assert (output.parent / "link").is_symlink()


def test_an_interrupted_replacement_leaves_the_old_bundle(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = content(bundle_copy)
    model = make_tiny_model(tmp_path / "other", seed=2)
    monkeypatch.setattr(export, "measure_parity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(model, bundle_copy)
    assert content(bundle_copy) == before
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "other"}


def test_a_graph_that_is_not_the_model_is_not_published(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_then_change(graph: Graph, *arguments: Any, **options: Any) -> Any:
        spec = export_graph(graph, *arguments, **options)
        if isinstance(norm := getattr(graph.module, "final_layer_norm", None), nn.LayerNorm):
            norm.weight.data *= 1.01
        return spec

    monkeypatch.setattr(export, "export_graph", export_then_change)
    with pytest.raises(ParityError, match=r"text_encoder/prompt_embeds is off by 9\.\de-03"):
        build(tiny_model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ExportError, match="is a folder that is not a bundle; it is not overwritten"
    ):
        build(tiny_model, tmp_path)
    with pytest.raises(ExportError, match="is a file"):
        build(tiny_model, tmp_path / "thesis.tex")
    assert content(tmp_path).keys() == {"thesis.tex"}


# Models that are refused, and forms of models that are read


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


# The command


@pytest.fixture
def quick_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`build_engines.py` with one sampler and without its signal handler."""
    monkeypatch.setattr(export, "ALL_SAMPLERS", {"ddim": export.ALL_SAMPLERS["ddim"]})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda *arguments: build_engines.main([str(argument) for argument in arguments])


def test_the_command_builds_and_says_what(
    quick_command: Callable[..., int],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert quick_command("--model", tiny_model, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "denoiser.onnx" in printed.out and "dB PSNR" in printed.out
    assert "export denoiser: " in printed.err
    assert Bundle.open(tmp_path / "out").manifest.model_name == "tiny"
    assert quick_command("--model", tiny_model, "--output", tmp_path / "out") == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "no such folder: nowhere"),
        (["--model", "./nowhere", "--target", "rtx:sm90"], "Hopper"),
    ],
)
def test_the_command_fails_in_one_line(
    quick_command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert quick_command(*arguments, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_an_interruption_of_the_command_is_exit_code_130(
    quick_command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "load_model", interrupt)
    assert quick_command("--model", "x", "--output", tmp_path / "out") == 130
    assert "interrupted; nothing was published" in capsys.readouterr().err


def test_an_error_without_words_is_told_by_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_engines.fail(OSError()) == 1
    assert capsys.readouterr().err == "build_engines.py: OSError\n"
    assert build_engines.fail("") == 1


def test_wrong_usage_is_exit_code_2() -> None:
    with pytest.raises(SystemExit) as exit_info:
        build_engines.main(["--precision", "int3"])
    assert exit_info.value.code == 2
