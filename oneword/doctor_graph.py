"""The sampler's step of a small model, compiled: a quick question to a compiler."""

from pathlib import Path

from engine.backends.step_graphs import STEP_UPDATE, step_graphs
from engine.bundle import ComponentSpec, LatentSpec, Manifest, TensorSpec, TextSpec
from engine.plans.compiler import Compilation, compile_plan
from engine.plans.profiles import buckets_of, profiles_of
from engine.plans.targets import Target

_LATENTS: list[int | str] = ["rows", 4, "height", "width"]


def compile_small_graph(folder: Path, target: Target) -> int:
    """The size of its plan in bytes; raises what compiling raises."""
    manifest = _manifest()
    graph = step_graphs(manifest, 1)[STEP_UPDATE]
    wanted = Compilation(
        onnx_path=graph.write(folder),
        target=target,
        spec=graph.spec,
        profiles=profiles_of(STEP_UPDATE, graph.spec, manifest, buckets_of(manifest.latents)),
        precision="fp32",
    )
    plan = folder / "small.plan"
    compile_plan(wanted, plan)
    return plan.stat().st_size


def _manifest() -> Manifest:
    """Of no bundle: as much as the graph needs to know."""
    latents = TensorSpec(name="latents", dtype="float16", shape=_LATENTS)
    noise_pred = TensorSpec(name="noise_pred", dtype="float16", shape=_LATENTS)
    denoiser = ComponentSpec(file="denoiser.onnx", inputs=[latents], outputs=[noise_pred])
    decoder = ComponentSpec(file="vae_decoder.onnx", inputs=[latents], outputs=[])
    return Manifest(
        format_version=0,
        family="",
        model_name="",
        precision="fp16",
        prediction_type="epsilon",
        scheduler_config={},
        text=TextSpec(
            max_tokens=8,
            dim=8,
            output_dim=8,
            vocab_size=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            embedding_fingerprint="",
        ),
        latents=LatentSpec(
            channels=4,
            scale_factor=8,
            size_multiple=64,
            default_size=128,
            scaling_factor=1.0,
            shift_factor=0.0,
        ),
        components={"denoiser": denoiser, "vae_decoder": decoder},
        files={},
        build_key="",
    )
