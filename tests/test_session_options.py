"""How ONNX Runtime is told to use a processor."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from engine.sessions import OnnxSession, sums_overflow, usable_cores


@pytest.fixture(scope="module")
def session(emoji_bundle_path: Path) -> OnnxSession:
    return OnnxSession(emoji_bundle_path / "vae_decoder.onnx")


def test_threads_stop_spinning_soon(session: OnnxSession) -> None:
    options = session._session.get_session_options()
    # The name is ONNX Runtime's.
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "2000"


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags : avx2 avx512f avx512_vnni", False),
        ("x86_64", "flags : avx2 avx_vnni", False),
        ("x86_64", "flags : avx2 fma", True),
        ("x86_64", None, True),  # nothing is known
        ("aarch64", "Features : asimd", False),
    ],
)
def test_8_bit_sums_overflow_on_x86_without_vnni(
    machine: str,
    flags: str | None,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    assert sums_overflow(tmp_path / "cpuinfo") is expected


def test_a_session_takes_the_cores_that_the_process_may_use(session: OnnxSession) -> None:
    assert session._session.get_session_options().intra_op_num_threads == usable_cores()


def test_a_single_number_stays_one(tmp_path: Path) -> None:
    """As graphs of other exporters take it; NumPy's ascontiguousarray would make it [1]."""
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["number"], ["shape"]),
            helper.make_node("Size", ["shape"], ["rank"]),
        ],
        "rank_of_a_number",
        [helper.make_tensor_value_info("number", number, None)],
        [helper.make_tensor_value_info("rank", onnx.TensorProto.INT64, [])],
    )
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "rank.onnx",
    )
    session = OnnxSession(tmp_path / "rank.onnx")
    assert session.run({"number": np.asarray(3.0)})["rank"] == 0
