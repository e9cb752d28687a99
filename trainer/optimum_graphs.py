"""The four graphs of an optimum export, changed into those of a bundle and held against them."""

import contextlib
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from engine.bundle import ComponentSpec, TensorSpec
from engine.sessions import Array, OnnxSession
from trainer.onnx_surgery import (
    FLOAT,
    INT64,
    Axes,
    cut_at_token_embedding,
    interface,
    make_timestep_a_row,
    rename_tensor,
    save_graph,
    scale_input,
    set_interface,
    split_posterior,
    take_scalar_as_vector,
)
from trainer.optimum_folder import GRAPHS, ImportRefused, OptimumFolder

# The same float32 operations in the same runtime: only fusions differ. A timestep that is off by
# one, or a word in a wrong place, gives 1e-2 and more.
MAX_RELATIVE_ERROR = 1e-5
_LATENTS: Axes = ("batch", "channels", "height", "width")

Interface = dict[str, tuple[int, Axes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedGraph:
    """One graph of the bundle to be, and what came off it."""

    spec: ComponentSpec
    table: np.ndarray | None = None  # token embeddings, of the text encoder


def change_graph(source: OptimumFolder, component: str, folder: Path) -> ChangedGraph:
    """Write one component of a bundle; raises `ImportRefused` or `SurgeryError`."""
    model = source.load_graph(component)
    _check_inputs(source, component, model)
    table = None
    if component == "text_encoder":
        table, sides = _text_encoder(source, model)
    else:
        change = {"denoiser": _denoiser, "vae_decoder": _vae_decoder, "vae_encoder": _vae_encoder}
        sides = change[component](source, model)
    set_interface(model, *sides)
    path = folder / f"{component}.onnx"
    save_graph(model, path)
    inputs, outputs = map(_specs, sides)
    spec = ComponentSpec(file=path.name, inputs=inputs, outputs=outputs, precision="fp32")
    return ChangedGraph(spec=spec, table=table)


def _check_inputs(source: OptimumFolder, component: str, model: onnx.ModelProto) -> None:
    """Names and ranks as optimum writes them, with every batch, height and width dynamic."""
    expected = {
        "text_encoder": {"input_ids": 2},
        "denoiser": {"sample": 4, "timestep": None, "encoder_hidden_states": 3},
        "vae_decoder": {"latent_sample": 4},
        "vae_encoder": {"sample": 4},
    }[component]
    found = interface(model.graph.input)
    path = source.graph_path(component)
    if found.keys() != expected.keys():
        raise ImportRefused(
            f"{path} takes {', '.join(found)}; optimum's takes {', '.join(expected)}"
        )
    for name, rank in expected.items():
        axes = found[name][1]
        if rank is None:
            continue
        fixed = [axes[index] for index in (0, *range(2, rank)) if isinstance(axes[index], int)]
        if component in ("text_encoder", "denoiser") and name != "sample":
            fixed = [axis for axis in axes[:1] if isinstance(axis, int)]
        if len(axes) != rank or fixed:
            raise ImportRefused(
                f"{path}: {name} is {axes}; batch, height and width must be dynamic: export "
                "without fixed shapes"
            )


def _text_encoder(
    source: OptimumFolder, model: onnx.ModelProto
) -> tuple[np.ndarray, tuple[Interface, Interface]]:
    if "last_hidden_state" not in interface(model.graph.output):
        raise ImportRefused(
            f"{source.graph_path('text_encoder')} gives no last_hidden_state; it is not a text "
            "encoder of Stable Diffusion"
        )
    rename_tensor(model, "last_hidden_state", "prompt_embeds")
    table = cut_at_token_embedding(
        model,
        input_ids="input_ids",
        embeds="inputs_embeds",
        eos_index="eos_index",
        hidden="prompt_embeds",
        pooled="pooled",
    )
    dim, width = int(table.shape[1]), int(source.text["hidden_size"])
    tokens = source.max_tokens
    return table.astype(np.float32), (
        {"inputs_embeds": (FLOAT, ("batch", tokens, dim)), "eos_index": (INT64, ("batch",))},
        {
            "prompt_embeds": (FLOAT, ("batch", tokens, width)),
            "pooled": (FLOAT, ("batch", width)),
        },
    )


def _denoiser(source: OptimumFolder, model: onnx.ModelProto) -> tuple[Interface, Interface]:
    make_timestep_a_row(model, "timestep")
    for old, new in (
        ("sample", "latents"),
        ("encoder_hidden_states", "prompt_embeds"),
        ("out_sample", "noise_pred"),
    ):
        rename_tensor(model, old, new)
    latents: Axes = ("rows", source.channels, "height", "width")
    dim = int(source.unet["cross_attention_dim"])
    return (
        {
            "latents": (FLOAT, latents),
            "timestep": (FLOAT, ("rows",)),
            "prompt_embeds": (FLOAT, ("rows", "tokens", dim)),
        },
        {"noise_pred": (FLOAT, latents)},
    )


def _vae_decoder(source: OptimumFolder, model: onnx.ModelProto) -> tuple[Interface, Interface]:
    rename_tensor(model, "latent_sample", "latents")
    rename_tensor(model, "sample", "images")
    scale_input(model, "latents", factor=1 / source.scaling_factor, shift=source.shift_factor)
    return (
        {"latents": (FLOAT, ("batch", source.channels, "height", "width"))},
        {"images": (FLOAT, ("batch", 3, "image_height", "image_width"))},
    )


def _vae_encoder(source: OptimumFolder, model: onnx.ModelProto) -> tuple[Interface, Interface]:
    outputs = interface(model.graph.output)
    if list(outputs) != ["latent_parameters"]:
        raise ImportRefused(
            f"{source.graph_path('vae_encoder')} gives {', '.join(outputs)}; needed are the "
            "latent_parameters of the posterior: export with a newer optimum"
        )
    rename_tensor(model, "sample", "images")
    split_posterior(
        model,
        "latent_parameters",
        channels=source.channels,
        factor=source.scaling_factor,
        shift=-source.shift_factor,
    )
    posterior: Axes = ("batch", source.channels, "latent_height", "latent_width")
    return (
        {"images": (FLOAT, ("batch", 3, "height", "width"))},
        {"mean": (FLOAT, posterior), "std": (FLOAT, posterior)},
    )


def _specs(side: Interface) -> list[TensorSpec]:
    names: dict[int, str] = {FLOAT: "float32", INT64: "int64"}
    return [
        TensorSpec(name=name, dtype=names[kind], shape=list(axes))
        for name, (kind, axes) in side.items()
    ]


def measure(source: OptimumFolder, component: str, bundle: Path, table: np.ndarray) -> float:
    """The largest error of a changed graph over the largest magnitude, against optimum's own.

    Both run in ONNX Runtime on the CPU: three rows, of three timesteps, at a size of no other use.
    """
    ours = OnnxSession(bundle / f"{component}.onnx")
    with _reference(source, component, bundle) as path:
        theirs = OnnxSession(path)
    compare = {
        "text_encoder": _compare_text_encoders,
        "denoiser": _compare_denoisers,
        "vae_decoder": _compare_decoders,
        "vae_encoder": _compare_encoders,
    }[component]
    return max(_relative_error(*pair) for pair in compare(source, ours, theirs, table))


@contextlib.contextmanager
def _reference(source: OptimumFolder, component: str, folder: Path) -> Generator[Path]:
    """Optimum's own graph; of a denoiser, a copy whose timestep is a vector of one value."""
    if component != "denoiser":
        yield source.graph_path(component)
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".reference.") as scratch:
        model = source.load_graph(component)
        take_scalar_as_vector(model, "timestep")
        path = Path(scratch) / "model.onnx"
        save_graph(model, path)
        yield path


Pairs = list[tuple[Array, Array]]


def _relative_error(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        raise ImportRefused(f"a changed graph gives {found.shape}, it gave {expected.shape}")
    error = np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def _compare_text_encoders(
    source: OptimumFolder, ours: OnnxSession, theirs: OnnxSession, table: np.ndarray
) -> Pairs:
    tokens, eos = source.max_tokens, source.tokenizer.eos_token_id
    rng = np.random.default_rng(0)
    words = np.setdiff1d(np.arange(len(table)), [eos])
    ids = rng.choice(words, (3, tokens)).astype(np.int64)
    ends = np.array([tokens - 1, tokens // 2, 2], np.int64)
    for row, end in enumerate(ends):
        ids[row, end:] = eos
    found = ours.run({"inputs_embeds": table[ids], "eos_index": ends})
    expected = theirs.run({"input_ids": ids})
    pairs = [(found["prompt_embeds"], expected["last_hidden_state"])]
    # transformers pools at argmax(ids) where a config has eos_token_id 2, which is EOS as well if
    # that is the last of the vocabulary.
    if "pooler_output" in expected and (source.text["eos_token_id"] == eos or eos == words.size):
        pairs.append((found["pooled"], expected["pooler_output"]))
    return pairs


def _compare_denoisers(
    source: OptimumFolder, ours: OnnxSession, theirs: OnnxSession, _table: np.ndarray
) -> Pairs:
    rng = np.random.default_rng(0)
    multiple = source.size_multiple
    shape = (3, source.channels, 3 * multiple, 5 * multiple)
    latents = rng.standard_normal(shape).astype(np.float32)
    dim = int(source.unet["cross_attention_dim"])
    prompts = rng.standard_normal((3, source.max_tokens, dim)).astype(np.float32)
    timesteps = np.array([0.0, 261.0, 999.0], np.float32)
    found = ours.run({"latents": latents, "timestep": timesteps, "prompt_embeds": prompts})
    pairs: Pairs = []
    for row, timestep in enumerate(timesteps):
        feeds = {
            "sample": latents[row : row + 1],
            "timestep": timestep.reshape(1),
            "encoder_hidden_states": prompts[row : row + 1],
        }
        pairs.append((found["noise_pred"][row : row + 1], theirs.run(feeds)["out_sample"]))
    return pairs


def _compare_decoders(
    source: OptimumFolder, ours: OnnxSession, theirs: OnnxSession, _table: np.ndarray
) -> Pairs:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, source.channels, 6, 10)).astype(np.float32)
    vae_latents = latents / source.scaling_factor + source.shift_factor
    expected = theirs.run({"latent_sample": vae_latents})["sample"]
    return [(ours.run({"latents": latents})["images"], expected)]


def _compare_encoders(
    source: OptimumFolder, ours: OnnxSession, theirs: OnnxSession, _table: np.ndarray
) -> Pairs:
    rng = np.random.default_rng(0)
    side = source.size_multiple * source.scale_factor
    images = rng.uniform(-1, 1, (2, 3, side, 2 * side)).astype(np.float32)
    parameters = theirs.run({"sample": images})["latent_parameters"]
    mean, logvar = np.split(parameters, 2, axis=1)
    found = ours.run({"images": images})
    return [
        (found["mean"], (mean - source.shift_factor) * source.scaling_factor),
        (found["std"], np.exp(np.clip(logvar, -30, 20) / 2) * source.scaling_factor),
    ]


COMPONENTS = tuple(GRAPHS)
