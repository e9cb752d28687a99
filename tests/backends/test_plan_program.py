"""Plans of the real compiler behind engines that compute on the host (host_engine.py)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from engine.backends.device import DeviceArray
from engine.backends.device_model import DeviceImageModel
from engine.backends.opening import plan_programs
from engine.backends.plan_program import PlanProgram, Scratch
from engine.backends.step_graphs import STEP_GRAPHS
from engine.bundle import Bundle
from engine.errors import BundleError, ConfigError, InvalidRequest, ProviderUnavailable
from engine.pipeline import ImageInFlight, Pipeline
from engine.plans.manifest import PLAN_MANIFEST
from engine.plans.selection import Plans, select_plans
from engine.requests import GenerationRequest, Limits
from tests.backends.host_device import HostDevice
from tests.backends.host_engine import HostEngine, HostRuntime

VERSION = pytest.importorskip("tensorrt_rtx").__version__


@pytest.fixture(scope="module")
def bundle(compiled_bundle: Path) -> Bundle:
    return Bundle.open(compiled_bundle)


@pytest.fixture(scope="module")
def plans(bundle: Bundle) -> Plans:
    return select_plans(
        bundle.path,
        build_key=bundle.manifest.build_key,
        kind="rtx",
        capability="sm89",
        library_version=VERSION,
        components=(*bundle.manifest.components, *STEP_GRAPHS),
    )


@pytest.fixture
def runtime(compiled_bundle: Path, step_graph_folder: Path) -> HostRuntime:
    return HostRuntime(compiled_bundle, step_graph_folder)


@pytest.fixture
def model(bundle: Bundle, plans: Plans, runtime: HostRuntime) -> DeviceImageModel:
    device = HostDevice()
    return DeviceImageModel(bundle, device, plan_programs(plans, runtime, device))


@pytest.fixture(scope="module")
def pipeline(compiled_bundle: Path) -> Pipeline:
    return Pipeline.open(compiled_bundle, limits=Limits(max_pixels=80 * 80))


def run(model: DeviceImageModel, images: list[ImageInFlight]) -> list[np.ndarray]:
    while not all(image.is_done for image in images):
        model.step([image for image in images if not image.is_done])
    return [model.current_latents(image) for image in images]


def request(**changes: object) -> GenerationRequest:
    usual = GenerationRequest(prompt="a red cat", seed=1, num_inference_steps=5, sampler="pndm")
    return dataclasses.replace(usual, **changes)


def test_images_of_plans_are_those_of_the_pipeline(
    model: DeviceImageModel, pipeline: Pipeline
) -> None:
    wanted = [request(sampler=s, seed=n) for n, s in enumerate(("ddim", "euler_a", "pndm"))]
    wanted.append(request(sampler="dpmpp_2m", guidance_scale=1.0, seed=9))
    ours = [image for one in wanted for image in model.begin(pipeline.plan(one))]
    reference = [image for one in wanted for image in pipeline.begin(pipeline.plan(one))]
    latents = run(model, ours)
    for image in reference:
        while not image.is_done:
            pipeline.step([image])
    for found, expected in zip(latents, reference, strict=True):
        scale = np.abs(expected.latents).max()
        # float16 graphs in two batch sizes; 1e-3 is a unit in the last place of float16.
        np.testing.assert_allclose(found / scale, expected.latents / scale, atol=1e-3)
    assert len(model.decode(ours)) == 4


def test_each_size_is_taken_by_the_narrowest_profile(
    model: DeviceImageModel, pipeline: Pipeline, runtime: HostRuntime
) -> None:
    for width, profile in ((24, 0), (40, 1)):
        images = model.begin(pipeline.plan(request(width=width, height=24)))
        run(model, images)
        model.decode(images)
        for name in ("denoiser", "vae_decoder", *STEP_GRAPHS):
            context = runtime.engines[name].contexts[-1]
            assert (context.profile, context.runs > 0) == (profile, True), name


def test_a_context_is_made_once_for_each_number_of_rows(
    model: DeviceImageModel, pipeline: Pipeline, runtime: HostRuntime
) -> None:
    run(model, model.begin(pipeline.plan(request(num_inference_steps=8))))
    contexts = runtime.engines["denoiser"].contexts
    assert len(contexts) == 2, "one for each of the two copies of the state"
    # The schedule of 8 steps has 9 rows; a call after which nothing is copied, but for two.
    assert sum(context.runs for context in contexts) == 9
    assert len({address for c in contexts for address in c.addresses.values()}) == 4
    states = [set(c.addresses.values()) for c in runtime.engines["step_update"].contexts]
    assert states[0] == states[1], "what one reads the other writes"


def test_all_plans_compute_in_the_same_memory(
    model: DeviceImageModel, pipeline: Pipeline, runtime: HostRuntime
) -> None:
    images = model.begin(pipeline.plan(request()))
    run(model, images)
    model.decode(images)
    used = [c.scratch for engine in runtime.engines.values() for c in engine.contexts]
    assert len(set(used)) == 1 and len(used) > 5
    largest = max(
        engine.get_device_memory_size_for_profile_v2(index)
        for engine in runtime.engines.values()
        for index in range(engine.num_optimization_profiles)
    )
    assert used[0][1] == largest


def test_more_rows_than_the_plans_take_are_several_calls(
    model: DeviceImageModel, pipeline: Pipeline, runtime: HostRuntime
) -> None:
    """20 images of two rows each; the plans take 16 rows."""
    plan = pipeline.plan(request(num_images=10, num_inference_steps=1, sampler="ddim"))
    images = [*model.begin(plan), *model.begin(plan)]
    model.step(images)
    rows = [context.shapes["latents"][0] for context in runtime.engines["denoiser"].contexts]
    assert sorted(rows) == [8, 16, 16]
    same = [model.current_latents(image) for image in (images[0], images[10])]
    np.testing.assert_allclose(same[0], same[1], atol=2e-3)
    assert len(model.decode(images)) == 20, "the decoder's plan takes 4"


def test_more_images_than_the_plans_have_slots_for_are_refused(
    model: DeviceImageModel, pipeline: Pipeline
) -> None:
    plan = pipeline.plan(request(num_images=13, num_inference_steps=1))
    images = [image for _ in range(5) for image in model.begin(plan)]
    with pytest.raises(ConfigError, match="more than 64 images .* lower max_images_in_flight"):
        model.step(images)


@pytest.mark.parametrize(
    ("size", "prompt", "words"),
    [
        (64, "a cat", "64 x 64 pixels with 1 prompt chunk: the plans for rtx:sm86,sm89 take 24x24"),
        (24, "cat " * 60, "24 x 24 pixels with 4 prompt chunks: .* at most 3 prompt chunks"),
    ],
)
def test_what_no_profile_takes_is_refused_before_anything_runs(
    model: DeviceImageModel,
    pipeline: Pipeline,
    runtime: HostRuntime,
    size: int,
    prompt: str,
    words: str,
) -> None:
    plan = pipeline.plan(request(prompt=prompt, width=size, height=size))
    with pytest.raises(InvalidRequest, match=words + ".*--bucket"):
        model.begin(plan)
    assert not any(engine.contexts for engine in runtime.engines.values())


# What an engine says against what its manifest says


@dataclasses.dataclass
class Changed:
    """A plan's manifest with one thing in it changed."""

    plans: Plans
    runtime: HostRuntime

    def open(self, **changes: object) -> PlanProgram:
        manifest = self.plans.manifest
        plan = manifest.components["denoiser"]
        changed = dataclasses.replace(plan, **changes)  # pyright: ignore[reportArgumentType]
        opened = self.runtime.open(self.plans.folder / plan.file, plan)
        components = {**manifest.components, "denoiser": changed}
        return PlanProgram(
            opened,
            "denoiser",
            dataclasses.replace(manifest, components=components),
            scratch=Scratch(HostDevice()),
        )


def test_an_engine_that_is_not_its_manifests_is_refused(plans: Plans, runtime: HostRuntime) -> None:
    changed = Changed(plans, runtime)
    changed.open()
    plan = plans.manifest.components["denoiser"]
    wrong = [dataclasses.replace(plan.outputs[0], dtype="float32")]
    with pytest.raises(BundleError, match="has outputs .*float16.* its manifest says .*float32"):
        changed.open(outputs=wrong)
    with pytest.raises(BundleError, match="has inputs"):
        changed.open(inputs=plan.inputs[1:])
    with pytest.raises(BundleError, match="has 2 profiles, its manifest says 1"):
        changed.open(profiles=plan.profiles[:1])
    with pytest.raises(BundleError, match=r"takes latents \[\[1, 4, 12, 12\].* in profile 0"):
        changed.open(profiles=plan.profiles[::-1])


def bound(program: PlanProgram, rows: int = 2) -> dict[str, DeviceArray]:
    device = HostDevice()
    shapes = {"latents": (rows, 4, 12, 12), "timestep": (rows,), "prompt_embeds": (rows, 20, 24)}
    return {t.name: device.empty(shapes[t.name], t.dtype) for t in program.spec.inputs}


def test_a_call_that_the_engine_refuses_is_an_error(
    plans: Plans, runtime: HostRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Changed(plans, runtime).open()
    outputs = {"noise_pred": HostDevice().empty((2, 4, 12, 12), "float16")}
    call = program.bind(bound(program), outputs)
    call()
    with pytest.raises(BundleError, match=r"gives noise_pred \(1, 4, 12, 12\), expected is \(2,"):
        program.bind(bound(program, rows=1), outputs)
    with pytest.raises(ProviderUnavailable, match=r"denoiser with inputs .*\(17, 4, 12, 12\)"):
        program.bind(bound(program, rows=17), outputs)
    monkeypatch.setattr(
        HostEngine, "get_device_memory_size_for_profile_v2", lambda _self, _index: 1 << 40
    )
    with pytest.raises(ProviderUnavailable, match=r"TensorRT refuses a call of denoiser\.plan"):
        call()


# Which plans are for a machine


def select(bundle: Bundle, **changes: object) -> Plans:
    usual = {"kind": "rtx", "capability": "sm86", "library_version": VERSION}
    settings = {**usual, "build_key": bundle.manifest.build_key, **changes}
    return select_plans(bundle.path, **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capability": "sm90"}, "this GPU is sm90; use --backend tensorrt or cuda"),
        ({"capability": "sm87"}, "compiles for sm75, .* this GPU is sm87$"),
        (
            {"capability": "sm120"},
            r"no plans of TensorRT for RTX for sm120 \(it has rtx:sm86,sm89\).*--target rtx:sm120",
        ),
        ({"kind": "trt"}, r"no plans of TensorRT for sm86 \(it has none\); .*--target trt:sm86"),
    ],
)
def test_plans_for_another_gpu_are_refused_in_words(
    bundle: Bundle, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ProviderUnavailable, match=words):
        select(bundle, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"build_key": "other"}, "compiled from build .* the bundle is build other"),
        ({"library_version": "1.3.9"}, "compiled by tensorrt_rtx .* has tensorrt_rtx 1.3.9"),
        ({"components": ["refiner"]}, "lack refiner; compile the target again"),
    ],
)
def test_stale_plans_are_refused_in_words(
    bundle: Bundle, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        select(bundle, **changes)
    assert select(bundle, library_version=f"{VERSION}.1").manifest.library_version == VERSION


def test_step_graphs_were_compiled_from_what_this_version_makes(
    plans: Plans, step_graph_folder: Path, runtime: HostRuntime
) -> None:
    """HostRuntime finds them by hash; their precision is float32 whatever the denoiser's is."""
    described = json.loads((plans.folder / PLAN_MANIFEST).read_text())["components"]
    assert {name: described[name]["precision"] for name in STEP_GRAPHS} == dict.fromkeys(
        STEP_GRAPHS, "fp32"
    )
    assert described["denoiser"]["precision"] == "fp16"
    for name in STEP_GRAPHS:
        runtime.open(plans.folder / f"{name}.plan", plans.manifest.components[name])
