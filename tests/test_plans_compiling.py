"""Compiling with TensorRT for RTX itself, which needs no GPU; what lies there is verified."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import ComponentSpec
from engine.errors import BundleError, ProviderUnavailable
from engine.plans.cache import PlanCache
from engine.plans.compiler import Compilation, compile_plan
from engine.plans.manifest import (
    FORMAT_VERSION,
    PLAN_MANIFEST,
    PlanManifest,
    read_plan_manifest,
)
from engine.plans.profiles import Profile
from engine.plans.targets import CAPABILITIES, Target
from engine.plans.tensorrt_module import import_tensorrt
from tests.tiny_model import make_tiny_model
from trainer import compile_plans
from trainer.compile_plans import PlanOptions, resolve_targets
from trainer.export import build_bundle

TARGET = Target(("sm86", "sm89"))


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


PROFILE: Profile = {
    "inputs_embeds": ([1, 20, 24], [2, 20, 24], [4, 20, 24]),
    "eos_index": ([1], [2], [4]),
}
OTHER: Profile = {
    "inputs_embeds": ([1, 20, 24], [1, 20, 24], [2, 20, 24]),
    "eos_index": ([1], [1], [2]),
}


def compilation(text_encoder: tuple[Path, ComponentSpec], **changes: Any) -> Compilation:
    onnx_path, spec = text_encoder
    usual = Compilation(onnx_path=onnx_path, target=TARGET, spec=spec, profiles=[PROFILE])
    return dataclasses.replace(usual, **changes)


@pytest.fixture(scope="module")
def plans(
    text_encoder: tuple[Path, ComponentSpec], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PlanManifest]:
    """A folder with one compiled plan and its manifest."""
    folder = tmp_path_factory.mktemp("plans") / TARGET.folder
    folder.mkdir()
    plan = compile_plan(compilation(text_encoder), folder / "text_encoder.plan")
    manifest = PlanManifest(
        format_version=FORMAT_VERSION,
        target=str(TARGET),
        library="tensorrt_rtx",
        library_version=import_tensorrt("rtx").__version__,
        buckets=["24x24"],
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
        ({"format_version": 99}, "format_version 99, this version reads 3"),
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
        compile_plan(compilation(text_encoder, onnx_path=broken), tmp_path / "a.plan")
    assert not (tmp_path / "a.plan").exists()


def test_a_graph_that_is_not_the_manifests_is_refused(
    text_encoder: tuple[Path, ComponentSpec], tmp_path: Path
) -> None:
    spec = text_encoder[1]
    float32 = [dataclasses.replace(tensor, dtype="float32") for tensor in spec.outputs]
    wrong = dataclasses.replace(spec, outputs=float32)
    with pytest.raises(BundleError, match="has outputs .*float16.*manifest says .*float32"):
        compile_plan(compilation(text_encoder, spec=wrong), tmp_path / "a.plan")


def test_a_profile_that_cannot_be_is_refused(
    text_encoder: tuple[Path, ComponentSpec], tmp_path: Path
) -> None:
    upside_down: Profile = {**PROFILE, "eos_index": ([4], [2], [1])}
    with pytest.raises(BundleError, match="profile"):
        compile_plan(compilation(text_encoder, profiles=[upside_down]), tmp_path / "a.plan")


def test_one_plan_is_compiled_for_every_capability(
    text_encoder: tuple[Path, ComponentSpec], tmp_path: Path
) -> None:
    """SM 75 to 121 in one plan, and for each alone."""
    for capabilities in (CAPABILITIES, *((one,) for one in CAPABILITIES)):
        plan = tmp_path / f"{'-'.join(capabilities)}.plan"
        wanted = compilation(text_encoder, target=Target(capabilities), profiles=[PROFILE, OTHER])
        compile_plan(wanted, plan)
        assert plan.read_bytes()[:4] == b"vtrt"


# The cache


def test_a_key_says_all_that_decides_what_is_compiled(
    text_encoder: tuple[Path, ComponentSpec], tmp_path: Path
) -> None:
    usual = compilation(text_encoder)
    sources = usual.sources()

    def key(library: str = "x 1", sources: dict[str, str] = sources, **changes: Any) -> str:
        return compilation(text_encoder, **changes).key(sources, library)

    assert key() == key()
    outputs = [dataclasses.replace(text_encoder[1].outputs[0], dtype="float32")]
    others = [
        key(library="x 2"),
        key(sources={"text_encoder.onnx": "another graph"}),
        key(sources={**sources, "text_encoder.onnx.data": "weights"}),
        key(target=Target(("sm86",))),
        key(target=Target(("sm86",), "trt")),
        key(profiles=[OTHER]),
        key(profiles=[PROFILE, OTHER]),
        key(precision="fp32"),
        key(spec=dataclasses.replace(text_encoder[1], outputs=outputs)),
    ]
    assert len({key(), *others}) == 1 + len(others)
    renamed = {"other_name.onnx": sources["text_encoder.onnx"]}
    assert key(sources=renamed) == key(), "a name decides nothing"


def test_what_is_in_the_cache_is_not_compiled_again(
    text_encoder: tuple[Path, ComponentSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PlanCache(tmp_path / "cache")
    first = compile_plan(compilation(text_encoder), tmp_path / "a.plan", cache=cache)
    built: list[Any] = []
    monkeypatch.setattr("engine.plans.compiler._build", lambda *a: built.append(a) or a[2].touch())
    second = compile_plan(compilation(text_encoder), tmp_path / "b.plan", cache=cache)
    assert not built and second == dataclasses.replace(first, file="b.plan")
    assert (tmp_path / "b.plan").read_bytes() == (tmp_path / "a.plan").read_bytes()
    compile_plan(compilation(text_encoder, profiles=[OTHER]), tmp_path / "c.plan", cache=cache)
    assert len(built) == 1


def test_a_damaged_plan_of_the_cache_is_not_used(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache")
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"vtrt and more")
    cache.keep("key", plan)
    assert cache.fetch("key", tmp_path / "b.plan")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"key.plan", "key.sha256"}
    (tmp_path / "cache" / "key.plan").write_bytes(b"vtrt and less")
    assert not cache.fetch("key", tmp_path / "c.plan")
    assert not (tmp_path / "c.plan").exists()
    assert not any((tmp_path / "cache").iterdir()), "it is made anew"
    assert not cache.fetch("another key", tmp_path / "d.plan")


# A whole bundle


def test_a_target_is_added_to_a_bundle_and_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = make_tiny_model(tmp_path / "model")
    options: dict[str, Any] = {
        "samplers": ["ddim"],
        "max_steps": 8,
        "targets": ["rtx:sm89"],
        "plans": PlanOptions(buckets=["24x24"], cache=tmp_path / "cache"),
    }
    first = build_bundle(model, tmp_path / "bundle", **options)
    assert first.was_built and first.compiled == ("rtx:sm89",)
    second = build_bundle(model, tmp_path / "bundle", **options)
    assert not second.was_built and second.compiled == ()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "bundle", "cache"}
    folder = tmp_path / "bundle" / "plans" / "rtx-sm89"
    found = read_plan_manifest(folder, build_key=first.manifest.build_key)
    between = {"row_input", "step_update", "decoder_input"}
    assert found.components.keys() == first.manifest.components.keys() | between
    assert found.buckets == ["24x24"]
    denoiser = {tensor.name: tensor.dtype for tensor in found.components["denoiser"].inputs}
    # The bundle is float32; its plans are compiled from float16 graphs of their own.
    assert denoiser == {"latents": "float16", "timestep": "float32", "prompt_embeds": "float16"}
    rows = found.components["row_input"]
    assert {t.name: t.dtype for t in rows.outputs}["latents"] == "float16"
    # Damaged plans are compiled again, which is to say taken from the cache.
    (folder / "denoiser.plan").write_bytes(b"vtrt, but no more than that")
    cached = {path.name for path in (tmp_path / "cache").iterdir()}
    monkeypatch.setattr("engine.plans.compiler._build", fail_to_build)
    third = build_bundle(model, tmp_path / "bundle", **options)
    assert third.compiled == ("rtx:sm89",)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == cached
    assert read_plan_manifest(folder, build_key=first.manifest.build_key) == found


def fail_to_build(*_: object) -> None:
    raise AssertionError("this plan should have come from the cache")


def test_changed_code_buckets_or_targets_are_another_plan_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, other = Target.parse("rtx:sm89"), Target.parse("rtx:sm86")
    key = compile_plans.plan_key(target, [])
    assert key == compile_plans.plan_key(target, [])
    assert key != compile_plans.plan_key(other, [])
    assert key != compile_plans.plan_key(target, [compile_plans.Bucket.parse("512")])
    monkeypatch.setattr(compile_plans, "digest_of_sources", lambda _: "other code")
    assert key != compile_plans.plan_key(target, [])


def test_targets_of_this_machines_gpu_need_tensorrt() -> None:
    """Where it is installed without a GPU, it is the GPU that is missing."""
    rtx = Target.parse("rtx:sm89")
    assert resolve_targets([rtx, rtx]) == [rtx]
    with pytest.raises(ProviderUnavailable, match=r"oneword\[tensorrt\]|GPU"):
        resolve_targets([Target.parse("trt:sm199")])
