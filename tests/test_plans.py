"""Plans for TensorRT for RTX: targets, profiles, compiling without a GPU, what is verified."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import ComponentSpec, LatentSpec, Manifest, TensorSpec, TextSpec
from engine.errors import BundleError, ProviderUnavailable
from engine.plans import (
    FORMAT_VERSION,
    PLAN_MANIFEST,
    PlanManifest,
    ShapeRange,
    Target,
    compile_plan,
    import_tensorrt_rtx,
    profile_of,
    read_plan_manifest,
)
from tests.tiny_model import make_tiny_model

TARGET = Target(("sm86", "sm89"))


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        format_version=1,
        family="stable-diffusion",
        model_name="sd",
        precision="fp16",
        prediction_type="epsilon",
        scheduler_config={},
        text=TextSpec(
            max_tokens=77,
            dim=768,
            output_dim=768,
            vocab_size=49408,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
            embedding_fingerprint="",
        ),
        latents=LatentSpec(
            channels=4,
            scale_factor=8,
            size_multiple=64,
            default_size=512,
            scaling_factor=0.18215,
            shift_factor=0.0,
        ),
        components={},
        files={},
        build_key="key",
    )


# Targets


def test_targets_are_read_in_any_order_and_case() -> None:
    target = Target.parse("RTX:SM120, sm86,sm86")
    assert target.capabilities == ("sm86", "sm120")
    assert (str(target), target.folder) == ("rtx:sm86,sm120", "rtx-sm86-sm120")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx:sm90", "Hopper .sm90. is not supported by TensorRT for RTX"),
        ("rtx:sm86,sm61", "unknown compute capability sm61 .*sm75, sm80, sm86"),
        ("cuda:sm86", "unknown target 'cuda:sm86'; write rtx:SM"),
        ("rtx:", "unknown target"),
    ],
)
def test_unknown_targets_are_refused_with_the_known_ones(text: str, message: str) -> None:
    with pytest.raises(ProviderUnavailable, match=message):
        Target.parse(text)


def test_a_missing_compiler_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ProviderUnavailable, match=r"pip install oneword\[rtx\]"):
        import_tensorrt_rtx()


# Profiles


def tensors(**shapes: list[int | str]) -> list[TensorSpec]:
    return [TensorSpec(name=n, dtype="float16", shape=shape) for n, shape in shapes.items()]


def test_profile_of_the_denoiser_spans_rows_sizes_and_chunks(manifest: Manifest) -> None:
    spec = ComponentSpec(
        file="denoiser.onnx",
        inputs=tensors(
            latents=["rows", 4, "height", "width"],
            timestep=["rows"],
            prompt_embeds=["rows", "tokens", 768],
        ),
        outputs=[],
    )
    assert profile_of("denoiser", spec, manifest) == {
        "latents": ([1, 4, 32, 32], [2, 4, 64, 64], [16, 4, 96, 96]),
        "timestep": ([1], [2], [16]),
        "prompt_embeds": ([1, 77, 768], [2, 77, 768], [16, 231, 768]),
    }


def test_profile_of_the_encoder_is_in_pixels_and_keeps_to_multiples(manifest: Manifest) -> None:
    odd = dataclasses.replace(manifest.latents, default_size=320)  # half of it is no multiple
    spec = ComponentSpec(
        file="vae_encoder.onnx", inputs=tensors(images=["batch", 3, "height", "width"]), outputs=[]
    )
    profile = profile_of("vae_encoder", spec, dataclasses.replace(manifest, latents=odd))
    assert profile["images"] == ([1, 3, 128, 128], [1, 3, 320, 320], [4, 3, 512, 512])


# Compilation: TensorRT for RTX itself, on the CPU


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ComponentSpec]:
    """A float16 graph of a tiny text encoder."""
    pytest.importorskip("tensorrt_rtx")
    from trainer.model import load_model
    from trainer.onnx_graphs import export_graph, graphs_of

    folder = tmp_path_factory.mktemp("graph")
    graph = graphs_of(load_model(make_tiny_model(folder / "model")))[0]
    spec = export_graph(graph, folder, precision="fp16")
    return folder / spec.file, spec


PROFILE: dict[str, ShapeRange] = {
    "inputs_embeds": ([1, 20, 24], [2, 20, 24], [4, 20, 24]),
    "eos_index": ([1], [2], [4]),
}


@pytest.fixture(scope="module")
def plans(
    text_encoder: tuple[Path, ComponentSpec], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PlanManifest]:
    """A folder with one compiled plan and its manifest."""
    folder = tmp_path_factory.mktemp("plans") / TARGET.folder
    folder.mkdir()
    onnx_path, spec = text_encoder
    plan = compile_plan(
        onnx_path, folder / "text_encoder.plan", target=TARGET, spec=spec, profile=PROFILE
    )
    manifest = PlanManifest(
        format_version=FORMAT_VERSION,
        target=str(TARGET),
        tensorrt_rtx_version=import_tensorrt_rtx().__version__,
        precision="fp16",
        bundle_build_key="key",
        plan_key="plan key",
        components={"text_encoder": plan},
    )
    (folder / PLAN_MANIFEST).write_text(manifest.to_json())
    return folder, manifest


def test_a_plan_is_compiled_without_a_gpu_and_verified(plans: tuple[Path, PlanManifest]) -> None:
    folder, manifest = plans
    assert (folder / "text_encoder.plan").read_bytes()[:4] == b"vtrt"
    assert read_plan_manifest(folder, build_key="key") == manifest
    assert manifest.components["text_encoder"].sources.keys() == {"text_encoder.onnx"}


def test_plans_of_another_build_are_refused(plans: tuple[Path, PlanManifest]) -> None:
    with pytest.raises(BundleError, match="compiled from build key.*bundle is build other"):
        read_plan_manifest(plans[0], build_key="other")


def copied(plans: tuple[Path, PlanManifest], to: Path, **changes: object) -> Path:
    """The folder again, with fields of its manifest changed."""
    folder, manifest = plans
    to /= folder.name
    to.mkdir()
    (to / "text_encoder.plan").write_bytes((folder / "text_encoder.plan").read_bytes())
    fields = {**json.loads(manifest.to_json()), **changes}
    (to / PLAN_MANIFEST).write_text(json.dumps(fields))
    return to


def test_a_damaged_plan_is_refused(plans: tuple[Path, PlanManifest], tmp_path: Path) -> None:
    folder = copied(plans, tmp_path)
    content = bytearray((folder / "text_encoder.plan").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "text_encoder.plan").write_bytes(content)
    with pytest.raises(BundleError, match=r"text_encoder\.plan is corrupted"):
        read_plan_manifest(folder, build_key="key")
    (folder / "text_encoder.plan").unlink()
    with pytest.raises(BundleError, match=r"text_encoder\.plan is missing"):
        read_plan_manifest(folder, build_key="key")


def test_a_plan_manifest_cannot_name_files_elsewhere(
    plans: tuple[Path, PlanManifest], tmp_path: Path
) -> None:
    components = json.loads(plans[1].to_json())["components"]
    components["text_encoder"]["file"] = "../text_encoder.plan"
    folder = copied(plans, tmp_path, components=components)
    with pytest.raises(BundleError, match="outside its folder"):
        read_plan_manifest(folder, build_key="key")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format_version 99, this version reads 2"),
        ({"target": "rtx:sm89"}, "compiled for rtx:sm89, the folder is not named after"),
        ({"target": "nonsense"}, "compiled for nonsense, the folder is not named after"),
        ({"surprise": 1}, "not a plan manifest"),
        ({"components": {"text_encoder": {}}}, "not a plan manifest"),
    ],
)
def test_strange_plan_manifests_are_refused(
    plans: tuple[Path, PlanManifest], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        read_plan_manifest(copied(plans, tmp_path, **changes), build_key="key")


def test_what_tensorrt_says_of_a_broken_graph_is_passed_on(
    text_encoder: tuple[Path, ComponentSpec], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph at all")
    with pytest.raises(BundleError, match=r"broken\.onnx cannot be parsed by TensorRT: ."):
        compile_plan(
            broken, tmp_path / "a.plan", target=TARGET, spec=text_encoder[1], profile=PROFILE
        )
    assert not (tmp_path / "a.plan").exists()


def test_a_graph_that_is_not_the_manifests_is_refused(
    text_encoder: tuple[Path, ComponentSpec], tmp_path: Path
) -> None:
    onnx_path, spec = text_encoder
    float32 = [dataclasses.replace(tensor, dtype="float32") for tensor in spec.outputs]
    wrong = dataclasses.replace(spec, outputs=float32)
    with pytest.raises(BundleError, match="has outputs .*float16.*manifest says .*float32"):
        compile_plan(onnx_path, tmp_path / "a.plan", target=TARGET, spec=wrong, profile=PROFILE)


def test_a_profile_that_cannot_be_is_refused(
    text_encoder: tuple[Path, ComponentSpec], tmp_path: Path
) -> None:
    onnx_path, spec = text_encoder
    upside_down: dict[str, ShapeRange] = {**PROFILE, "eos_index": ([4], [2], [1])}
    with pytest.raises(BundleError, match="profile"):
        compile_plan(onnx_path, tmp_path / "a.plan", target=TARGET, spec=spec, profile=upside_down)


def test_a_target_is_added_to_a_bundle_and_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from trainer import compile_plans
    from trainer.export import build_bundle

    model = make_tiny_model(tmp_path / "model")
    options: dict[str, Any] = {"samplers": ["ddim"], "max_steps": 8, "targets": ["rtx:sm89"]}
    first = build_bundle(model, tmp_path / "bundle", **options)
    assert first.was_built and first.compiled == ("rtx:sm89",)
    second = build_bundle(model, tmp_path / "bundle", **options)
    assert not second.was_built and second.compiled == ()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "bundle"}
    folder = tmp_path / "bundle" / "plans" / "rtx-sm89"
    found = read_plan_manifest(folder, build_key=first.manifest.build_key)
    assert found.components.keys() == first.manifest.components.keys()
    denoiser = {tensor.name: tensor.dtype for tensor in found.components["denoiser"].inputs}
    target = Target.parse("rtx:sm89")
    assert found.plan_key == compile_plans.plan_key(target)
    monkeypatch.setattr(compile_plans, "digest_of_sources", lambda _: "other code")
    assert found.plan_key != compile_plans.plan_key(target)
    # The bundle is float32; its plans are compiled from float16 graphs of their own.
    assert denoiser == {"latents": "float16", "timestep": "float32", "prompt_embeds": "float16"}
