"""A denoiser in 8 bits: what is rounded, by how much, and that batch mates stay strangers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from engine.sessions import OnnxSession
from tests.conftest import EMOJI_MODEL
from tests.export_setup import build
from trainer import calibration
from trainer.calibration import RangeRecorder, add_range_outputs
from trainer.export import BuildReport
from trainer.parity import ParityError
from trainer.quantization import (
    HEADROOM,
    int8_by_channel,
    quantize,
    quantized_layers,
    uint8_step,
    uint8_steps,
)

RNG = np.random.default_rng(0)
CHANNELS, SIZE = 6, 5


def _ranges(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The range of each channel, the second axis."""
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    return np.stack([values.min(axes), values.max(axes)])


def test_weights_are_rounded_by_half_a_step_of_their_channel() -> None:
    weight = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32) * [
        [[[1]]],
        [[[9]]],
        [[[0]]],
        [[[1e-6]]],
    ]
    weight = weight.astype(np.float32)
    values, scales = int8_by_channel(weight, 0)
    assert values.dtype == np.int8 and np.abs(values).max() == 127
    restored = values * scales[:, None, None, None]
    # Half a step, and the rounding of float32 on the way.
    assert (np.abs(restored - weight) <= 0.5001 * scales[:, None, None, None]).all()


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)])
def test_activations_cover_their_range_and_zero_is_exact(low: float, high: float) -> None:
    """Zero is what convolutions pad with."""
    steps, zeros = uint8_steps(np.array([[low], [high]], np.float32))
    covered = (np.array([0, 255]) - int(zeros[0])) * steps[0]
    assert covered[0] <= min(low, 0) + 0.51 * steps[0]
    assert covered[1] >= max(high, 0) - 0.51 * steps[0]
    assert steps[0] > 0


def _convolution() -> tuple[onnx.ModelProto, dict[str, Any]]:
    """x -> Relu -> Conv -> Relu, so that the convolution neither begins nor ends the graph."""
    weight = RNG.standard_normal((4, CHANNELS, 3, 3)).astype(np.float32)
    weight[1] *= 20  # a channel whose range would leave the others few steps
    weights = {"w": weight, "b": RNG.standard_normal(4).astype(np.float32)}
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["in"]),
        onnx.helper.make_node("Conv", ["in", "w", "b"], ["out"], pads=[1] * 4, name="conv"),
        onnx.helper.make_node("Relu", ["out"], ["y"]),
    ]
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["rows", c, SIZE, SIZE])
        for n, c in (("x", CHANNELS), ("y", 4))
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], initializers)
    opset = onnx.helper.make_opsetid("", 18)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), weights


def _run(model: onnx.ModelProto, x: np.ndarray[Any, Any], path: Path) -> dict[str, Any]:
    onnx.save(model, path)
    return OnnxSession(path).run({"x": x})


def test_a_convolution_is_off_by_no_more_than_its_steps(tmp_path: Path) -> None:
    model, weights = _convolution()
    layers = quantized_layers(model.graph)
    assert [layer.node.name for layer in layers] == ["conv"]
    x = RNG.standard_normal((3, CHANNELS, SIZE, SIZE)).astype(np.float32)
    recording = onnx.ModelProto.FromString(model.SerializeToString())
    add_range_outputs(recording, layers)
    onnx.save(recording, tmp_path / "recording.onnx")
    recorder = RangeRecorder(OnnxSession(tmp_path / "recording.onnx"))
    exact = recorder.run({"x": x})["y"]
    quantize(model, layers, recorder.ranges)
    found = _run(model, x, tmp_path / "int8.onnx")["y"]
    step, _ = uint8_step(recorder.ranges["in"])
    steps, _ = uint8_steps(HEADROOM * recorder.ranges["out"])
    magnitudes = np.abs(weights["w"])
    largest = magnitudes.max((1, 2, 3)) / 127
    # Half a step of each input times its weight, half a step of each weight times its input, half
    # a step of the output; and a step of the integer bias.
    bound = (
        step / 2 * magnitudes.sum((1, 2, 3))
        + largest / 2 * 9 * CHANNELS * np.maximum(x, 0).max()
        + steps / 2
        + step * largest
    )
    error = np.abs(found - exact).max((0, 2, 3))
    assert (error <= bound).all()
    # The quiet channels keep their own steps beside the loud one.
    assert error[0] < steps[1]
    assert (error > 0).all()


def test_ranges_are_the_extremes_of_all_calls(tmp_path: Path) -> None:
    model, _ = _convolution()
    add_range_outputs(model, quantized_layers(model.graph))
    onnx.save(model, tmp_path / "recording.onnx")
    recorder = RangeRecorder(OnnxSession(tmp_path / "recording.onnx"))
    calls = [RNG.standard_normal((2, CHANNELS, SIZE, SIZE)).astype(np.float32) for _ in range(3)]
    for x in calls:
        assert set(recorder.run({"x": x})) == {"y"}
    together = np.maximum(np.concatenate(calls), 0)
    np.testing.assert_array_equal(recorder.ranges["in"], _ranges(together))


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    """The embedded model: random weights have no quality that could be kept."""
    return build(EMOJI_MODEL, tmp_path_factory.mktemp("int8") / "emoji", precision="int8")


def test_an_int8_bundle_says_so_and_its_cost_is_on_record(int8: BuildReport) -> None:
    assert int8.manifest.precision == "int8"
    recorded = json.loads((int8.path / "parity.json").read_text())
    assert recorded["limits"]["min_image_psnr_db"] == 30.0
    assert recorded["image_psnr_db"] > 40  # seen: 56; another concept gives 13
    errors = recorded["max_relative_error"]
    assert 1e-3 < errors["denoiser"]["noise_pred"] < 0.3
    assert max(errors["vae_decoder"].values()) < 1e-4
    assert not list(int8.path.glob(".*"))


def test_onnxruntime_takes_its_8_bit_kernels(int8: BuildReport, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(
        str(int8.path / "denoiser.onnx"), options, providers=["CPUExecutionProvider"]
    )
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    layers = Counter(
        layer.node.op_type
        for layer in quantized_layers(onnx.load(int8.path / "denoiser.onnx").graph)
    )
    assert not layers  # all that may be, is
    assert kinds["QLinearConv"] == 26 and kinds["MatMulIntegerToFloat"] == 32


def test_first_and_last_layers_the_prompt_and_the_time_stay_float32(int8: BuildReport) -> None:
    model = onnx.load(int8.path / "denoiser.onnx")
    weights = {tensor.name for tensor in model.graph.initializer}
    plain = {
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in weights
    }
    parts = ("conv_in", "conv_out", "conv_shortcut", "attn2/to_k", "attn2/to_v", "time_emb")
    for part in parts:
        assert any(part in name for name in plain), part
    assert all(any(part in name for part in parts) for name in plain), plain


def test_an_image_does_not_depend_on_what_shares_its_call(int8: BuildReport) -> None:
    session = OnnxSession(int8.path / "denoiser.onnx")
    rng = np.random.default_rng(1)
    rows = {
        "latents": rng.standard_normal((3, 4, 16, 16), np.float32),
        "timestep": np.array([10, 500, 990], np.float32),
        "prompt_embeds": rng.standard_normal((3, 32, 192), np.float32),
    }
    rows["latents"][2] *= 50  # a dynamic scale of the whole batch would crush the others
    together = session.run(rows)["noise_pred"]
    for row in range(3):
        alone = session.run({name: value[row : row + 1] for name, value in rows.items()})
        # Rounding of float32 may carry a value over the edge of a step: a few of them.
        difference = np.abs(alone["noise_pred"][0] - together[row])
        assert np.median(difference) < 1e-2 * np.abs(together[row]).max()


def test_a_bad_calibration_fails_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges a hundredth of what they are: everything saturates, and nothing is published."""
    measured = calibration.measure_ranges

    def shrunken(*words: Any, **named: Any) -> dict[str, Any]:
        return {name: seen / 100 for name, seen in measured(*words, **named).items()}

    monkeypatch.setattr(calibration, "measure_ranges", shrunken)
    with pytest.raises(ParityError, match=r"the int8 bundle does not match PyTorch.*denoiser"):
        build(EMOJI_MODEL, tmp_path / "bad", precision="int8")
    assert not (tmp_path / "bad").exists()
