"""Backends by name: what cannot be had is an error with its remedy, and nothing falls back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.backends.cuda_device import CudaDevice, checked, find_gpu, import_cuda
from engine.backends.device import DeviceArray
from engine.backends.names import BACKENDS
from engine.backends.opening import open_model
from engine.backends.ort_program import OrtProgram
from engine.backends.tensorrt_runtime import TensorRtRuntime, default_cache_dir
from engine.bundle import Bundle
from engine.errors import BundleError, ConfigError, ProviderUnavailable
from engine.pipeline import Pipeline
from engine.plans.manifest import PLANS_FOLDER, read_plan_manifest
from engine.serving.model_opening import open_here
from engine.serving.server_config import ServerConfig
from engine.sessions import OnnxSession, import_onnxruntime
from tests.backends.host_device import HostDevice, host_view
from tests.conftest import ROOT

HAS_CUDA_PROVIDER = "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()


def has_gpu() -> bool:
    try:
        find_gpu()
    except ProviderUnavailable:
        return False
    return True


no_gpu = pytest.mark.skipif(has_gpu(), reason="says what is missing without a GPU")


def test_the_default_is_the_cpu_in_plain_memory(emoji_bundle_path: Path) -> None:
    planner, model = open_here(emoji_bundle_path)
    assert ServerConfig(bundle=emoji_bundle_path).backend == BACKENDS[0] == "cpu"
    assert isinstance(model, Pipeline) and planner is model


def test_unknown_backends_are_refused_with_the_known_ones(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="one of cpu, openvino, .*, rtx, or .*'x'"):
        open_model(pipeline.bundle, "x")
    with pytest.raises(ConfigError, match="backend must be one of"):
        ServerConfig(bundle=Path("bundle"), backend="gpu")
    with pytest.raises(ProviderUnavailable, match="asked for NoExecutionProvider"):
        open_model(pipeline.bundle, "NoExecutionProvider")


@no_gpu
@pytest.mark.parametrize("backend", ["cuda", "cuda-graphs", "tensorrt", "rtx"])
def test_a_backend_without_a_gpu_is_an_error_with_its_remedy(
    pipeline: Pipeline, backend: str
) -> None:
    with pytest.raises(ProviderUnavailable, match=r"pip install oneword\[|needs an NVIDIA GPU"):
        open_model(pipeline.bundle, backend)


@no_gpu
def test_the_command_says_so_in_one_line(emoji_bundle_path: Path, tmp_path: Path) -> None:
    words = ["generate", "--bundle", str(emoji_bundle_path), "a cat", "--backend", "rtx"]
    words += ["--output", str(tmp_path / "x.png")]
    done = subprocess.run(
        [sys.executable, "-m", "oneword", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("oneword: ") and ("oneword[rtx]" in line or "NVIDIA GPU" in line)


# CUDA's bindings


@no_gpu
def test_what_cuda_says_without_a_driver_comes_with_the_remedy() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    with pytest.raises(ProviderUnavailable, match=r"find a GPU: .* driver .*\(580 or newer\)"):
        CudaDevice(records=True)


def test_missing_bindings_are_an_error_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(ProviderUnavailable, match=r"cuda-bindings is not .*oneword\[gpu\]"):
        find_gpu()


def test_errors_of_cuda_are_told_apart() -> None:
    """By the status numbers of the runtime's own enumeration."""
    pytest.importorskip("cuda.bindings.runtime")
    cuda = import_cuda()
    assert checked(cuda, "work", (cuda.cudaError_t.cudaSuccess, 7)) == (7,)
    with pytest.raises(ProviderUnavailable, match="out of memory .* lower max_batch_rows"):
        checked(cuda, "allocate", (cuda.cudaError_t.cudaErrorMemoryAllocation, None))
    with pytest.raises(Exception, match="illegal memory access .* must be started again"):
        checked(cuda, "work", (cuda.cudaError_t.cudaErrorIllegalAddress,))


# Plans and the libraries themselves


@no_gpu
def test_tensorrt_for_rtx_refuses_a_plan_without_a_gpu_and_says_why(compiled_bundle: Path) -> None:
    """The library's own runtime, on a plan of its own compiler."""
    (folder,) = (compiled_bundle / PLANS_FOLDER).iterdir()
    build_key = Bundle.open(compiled_bundle).manifest.build_key
    plan = read_plan_manifest(folder, build_key=build_key).components["text_encoder"]
    runtime = TensorRtRuntime("rtx", gpu_name="none")
    with pytest.raises(BundleError, match=r"tensorrt_rtx .* does not take text_encoder\.plan: .+"):
        runtime.open(folder / plan.file, plan)


def test_the_cache_of_tensorrt_for_rtx_is_in_the_users_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "oneword" / "rtx"


# ONNX Runtime by address


def test_io_binding_gives_what_run_gives(emoji_bundle_path: Path) -> None:
    bundle = Bundle.open(emoji_bundle_path)
    spec = bundle.manifest.components["denoiser"]
    file, device = bundle.path / spec.file, HostDevice()
    program, session = OrtProgram(file, spec, num_threads=1), OnnxSession(file, num_threads=1)
    generator = np.random.default_rng(0)
    for rows, side in ((1, 8), (3, 16)):
        shapes = {
            "latents": (rows, bundle.manifest.latents.channels, side, side),
            "timestep": (rows,),
            "prompt_embeds": (rows, bundle.manifest.text.max_tokens, bundle.manifest.text.dim),
        }
        feeds = {n: generator.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        arrays = {name: device.empty(shape, np.float32) for name, shape in shapes.items()}
        answer = device.empty(shapes["latents"], np.float32)
        call = program.bind(arrays, {"noise_pred": answer})
        for _ in range(2):  # bound once, called again with other numbers in the same place
            feeds["latents"] = feeds["latents"] + 1.0
            for name, values in feeds.items():
                device.upload(arrays[name], values)
            call()
            expected = session.run(feeds)["noise_pred"]
            np.testing.assert_array_equal(device.download(answer), expected)


@pytest.mark.skipif(HAS_CUDA_PROVIDER, reason="this ONNX Runtime has CUDA")
def test_onnx_runtime_without_cuda_is_an_error_with_its_remedy(emoji_bundle_path: Path) -> None:
    bundle = Bundle.open(emoji_bundle_path)
    spec = bundle.manifest.components["text_encoder"]
    with pytest.raises(ProviderUnavailable, match=r"not CUDAExecution.*install oneword\[gpu\]"):
        OrtProgram(bundle.path / spec.file, spec, memory="cuda")


def test_a_graph_that_is_not_the_manifests_is_refused(emoji_bundle_path: Path) -> None:
    bundle = Bundle.open(emoji_bundle_path)
    spec = bundle.manifest.components["text_encoder"]
    with pytest.raises(BundleError, match="takes .* the manifest says"):
        OrtProgram(bundle.path / "vae_decoder.onnx", spec)
    with pytest.raises(BundleError, match="cannot be loaded"):
        OrtProgram(b"no graph", spec)


# The host's memory as a device


def test_parts_of_arrays_are_where_numpy_has_them() -> None:
    device = HostDevice()
    array = device.empty((3, 4, 5), np.float32)
    assert array.address % 256 == 0 and not device.download(array).any()
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    device.upload(array, values)
    np.testing.assert_array_equal(device.download(array.part(1)), values[1])
    np.testing.assert_array_equal(device.download(array.part(2, 3)), values[2, 3])
    np.testing.assert_array_equal(device.download(array.first(2)), values[:2])
    device.upload(array.part(0), values[2])
    assert host_view(array)[0, 0, 0] == values[2, 0, 0]
    view = array.view(80, (5,), np.int32)
    assert isinstance(view, DeviceArray)
    np.testing.assert_array_equal(device.download(view), values[1, 0].view(np.int32))
