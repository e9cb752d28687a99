"""The trained evaluator as files that ONNX Runtime reads, weights in float16."""

import contextlib
import json
import tempfile
import warnings
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from tokenizers import Tokenizer
from torch import nn

from engine.files import sha256_of_file, write_atomically
from models.recipe.evaluator import EMBED_DIM, IMAGE_SIZE, EvaluatorNetwork
from models.recipe.lessons import MAX_TOKENS
from models.recipe.objects import COLOURS
from trainer.evaluator import FILES, FORMAT, IMAGE_FILE, SPEC_FILE, TEXT_FILE, TOKENIZER_FILE

_OPSET_VERSION = 17
_SMALLEST_HALVED = 256  # values; smaller weights are not worth a cast


def export_evaluator(
    network: EvaluatorNetwork,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    nouns: Iterable[str],
    held_out_nouns: Iterable[str],
    styles: Iterable[str],
) -> None:
    """Writes the folder that `trainer.evaluator.Evaluator` opens, `evaluator.json` last."""
    network.cpu().eval()
    pixels = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    _write_graph(network.image_encoder, {"pixels": (pixels, {0: "images"})}, folder / IMAGE_FILE)
    axes = {0: "sentences", 1: "tokens"}
    ones = torch.ones(2, 5, dtype=torch.int64)
    feeds = {"input_ids": (ones, axes), "attention_mask": (ones, axes)}
    _write_graph(network.text_encoder, feeds, folder / TEXT_FILE)
    write_atomically(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True).encode())
    spec = {
        "format": FORMAT,
        "image_size": IMAGE_SIZE,
        "embed_dim": EMBED_DIM,
        "max_tokens": MAX_TOKENS,
        "pixel_mean": 0.5,
        "pixel_std": 0.5,
        "logit_scale": network.log_scale.exp().item(),
        "logit_bias": network.bias.item(),
        "nouns": sorted(nouns),
        "held_out_nouns": sorted(held_out_nouns),
        "styles": sorted(styles),
        "colours": list(COLOURS),
        "sha256": {name: sha256_of_file(folder / name) for name in FILES},
    }
    write_spec(folder, spec)


def write_spec(folder: Path, spec: dict[str, Any]) -> None:
    """Writes `evaluator.json`."""
    write_atomically(folder / SPEC_FILE, (json.dumps(spec, indent=2) + "\n").encode())


def _write_graph(
    module: nn.Module, inputs: dict[str, tuple[torch.Tensor, dict[int, str]]], path: Path
) -> None:
    output = path.stem.replace("encoder", "embeds")
    axes = {name: named for name, (_, named) in inputs.items()}
    first_axis = next(iter(axes.values()))[0]
    with tempfile.TemporaryDirectory() as scratch:
        traced = Path(scratch) / path.name
        with torch.no_grad(), _without_exporter_warnings():
            torch.onnx.export(
                module,
                tuple(example for example, _ in inputs.values()),
                traced,
                input_names=list(inputs),
                output_names=[output],
                dynamic_axes={**axes, output: {0: first_axis}},
                opset_version=_OPSET_VERSION,
                dynamo=False,
            )
        write_atomically(path, halved(onnx.load(traced)).SerializeToString())


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with large weights stored as float16 and cast back when it is loaded.

    Computing stays in float32: half the size, and no CPU needs float16 arithmetic.
    """
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < _SMALLEST_HALVED:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(
            onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


@contextlib.contextmanager
def _without_exporter_warnings() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
