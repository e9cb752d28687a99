"""The parity gate: no bundle is published that does not draw what diffusers draws.

Each graph runs in ONNX Runtime at sizes other than those it was traced with and is compared with
its float32 PyTorch module; then the runtime draws a whole image with a concept in it, and the
family's diffusers pipeline draws the same image with the concept loaded its own way.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float, Float32
from torch import Tensor

from engine.bundle import Bundle
from engine.concepts import Concept
from engine.pipeline import Pipeline, sound
from engine.requests import GenerationRequest, Limits
from engine.sessions import Array, Feeds, Session
from trainer.messages import first_line
from trainer.model import DiffusionModel
from trainer.onnx_graphs import ExportError, Graph
from trainer.splicing import as_concept

# Largest error of an output over its largest magnitude. Measured: float32 graphs 1e-6, float16
# graphs 1e-3 to 3e-3 (docs/bundle.md); a graph that is wrong is off by 1e-1 and more. An 8-bit
# denoiser is off by 1e-1 itself, on random inputs that are unlike any it was calibrated with: so
# its float32 graph goes through the gate first (`check_float32_denoiser`).
MAX_RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 2e-2, "int8": 3e-1}
# Of a whole image in 8 bits; rounding to them alone gives 58.9 dB. The embedded model: 58.9 dB in
# float32 and 58.6 in float16, which deeper models lose more by; with another concept 13 dB, with
# timesteps that are off by one of a thousand 50.4 dB. Float32 may add 0.35 of a level, rms, to the
# 0.29 of rounding.
MIN_PSNR_DB = {"fp32": 55.0, "fp16": 30.0, "int8": 30.0}
PLACEHOLDER_TOKEN = "<parity>"
NUM_VECTORS = 2
NUM_INFERENCE_STEPS = 4
GUIDANCE_SCALE = 3.0
SEED = 7


class ParityError(ExportError):
    """A graph or an image differs from PyTorch's by more than its tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What the gate measured; `parity.json` holds it."""

    max_relative_error: dict[str, dict[str, float]]  # component -> output -> error
    image_psnr_db: float

    def check(self, precisions: Mapping[str, str], precision: str) -> None:
        """Raise `ParityError` that names everything outside its tolerance."""
        failures = [
            f"{component}/{output} is off by {error:.1e} of its range "
            f"(limit {MAX_RELATIVE_ERROR[precisions[component]]:.0e})"
            for component, errors in self.max_relative_error.items()
            for output, error in errors.items()
            if not error <= MAX_RELATIVE_ERROR[precisions[component]]  # NaN fails as well
        ]
        if not self.image_psnr_db >= MIN_PSNR_DB[precision]:
            failures.append(
                f"the image has {self.image_psnr_db:.1f} dB PSNR to diffusers' "
                f"(limit {MIN_PSNR_DB[precision]:.0f} dB)"
            )
        if failures:
            raise ParityError(
                f"the {precision} bundle does not match PyTorch: " + "; ".join(failures)
            )


def measure_parity(bundle: Bundle, model: DiffusionModel, graphs: list[Graph]) -> Parity:
    """Compare a complete bundle with the float32 model it was made of, on the CPU."""
    sessions: dict[str, Session] = {graph.name: bundle.open_session(graph.name) for graph in graphs}
    return Parity(
        max_relative_error={
            graph.name: component_errors(graph, sessions[graph.name]) for graph in graphs
        },
        image_psnr_db=image_psnr_db(bundle, sessions, model),
    )


def check_float32_denoiser(bundle: Bundle, graphs: list[Graph]) -> None:
    """The gate for a denoiser that is to be quantized; raises `ParityError`."""
    graph = next(graph for graph in graphs if graph.name == "denoiser")
    errors = component_errors(graph, bundle.open_session(graph.name))
    parity = Parity(max_relative_error={graph.name: errors}, image_psnr_db=math.inf)
    parity.check({graph.name: "fp32"}, "fp32")


def component_errors(graph: Graph, session: Session) -> dict[str, float]:
    """The largest relative error of each output over batches of 1, 2 and 3 of several sizes."""
    errors = dict.fromkeys(graph.outputs, 0.0)
    for seed, sizes in enumerate(_checked_sizes(graph)):
        inputs = graph.random_inputs(sizes, seed)
        with torch.no_grad():
            expected = graph.module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        feeds = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
        outputs = _run(graph, session, feeds, sizes)
        for name, reference in zip(graph.outputs, expected, strict=True):
            error = _relative_error(outputs[name], reference.numpy())
            errors[name] = error if math.isnan(error) else max(errors[name], error)
    return errors


def _run(graph: Graph, session: Session, feeds: Feeds, sizes: dict[str, int]) -> dict[str, Array]:
    try:
        return session.run(feeds)
    except Exception as error:  # a size that the trace has frozen: classes of ONNX Runtime's own
        raise ParityError(
            f"{graph.name}.onnx does not run at {sizes}: {first_line(error)}"
        ) from error


def _checked_sizes(graph: Graph) -> Iterator[dict[str, int]]:
    multiple, tokens = graph.size_multiple, graph.max_tokens
    for batch, height, width, length in (
        (1, 2, 4, tokens),
        (2, 4, 2, 2 * tokens),
        (3, 6, 4, tokens - 3),
    ):
        yield {
            "batch": batch,
            "rows": batch,
            "height": height * multiple,
            "width": width * multiple,
            "tokens": length,
        }


def _relative_error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    if found.shape != expected.shape:
        return math.inf
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def image_psnr_db(bundle: Bundle, sessions: dict[str, Session], model: DiffusionModel) -> float:
    """PSNR between the runtime's image and diffusers', same prompt, seed, concept and steps."""
    spec = bundle.manifest.latents
    concept = _random_concept(model)
    request = GenerationRequest(
        prompt=f"a photo of {PLACEHOLDER_TOKEN}, in the morning",
        negative_prompt="a drawing" if model.family.takes_negative_prompt else "",
        concepts=(concept,),
        height=2 * spec.size_multiple,
        width=3 * spec.size_multiple,
        seed=SEED,
        sampler="ddim",
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
    )
    pipeline = Pipeline(bundle, sessions, limits=Limits())
    images = pipeline.begin(pipeline.plan(request))
    while not images[0].is_done:
        pipeline.step(images)
    return psnr_db(sound(pipeline.decode(images))[0] / 255.0, draw_with_diffusers(model, request))


def draw_with_diffusers(
    model: DiffusionModel, request: GenerationRequest
) -> Float[np.ndarray, "height width 3"]:
    """The image, in [0, 1], that the family's text-to-image pipeline draws with DDIM."""
    pipeline = diffusers_pipeline(model)
    for concept in request.concepts:
        load_concept(pipeline, model, concept)
    return pipeline(
        request.prompt,
        # SDXL's pipeline encodes "" but takes zeros for None; the same to the others.
        negative_prompt=request.negative_prompt or None,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).images[0]


def diffusers_pipeline(model: DiffusionModel) -> Any:
    """The family's pipeline of diffusers around a model.

    Tokenizers and text encoders are copied: loading a concept there adds to both.
    """
    options = dict(model.family.pipeline_options)
    for encoder in model.encoders:
        text_encoder = copy.deepcopy(encoder.text_encoder)
        core: Any = getattr(text_encoder, "text_model", text_encoder)
        # Where a config has 2 here, transformers pools at the largest id: at a concept, not at EOS.
        core.eos_token_id = encoder.eos_token_id
        options[encoder.spec.folder] = text_encoder
        options[encoder.spec.tokenizer] = copy.deepcopy(encoder.tokenizer)
    if model.family.zero_empty_negative:
        options["force_zeros_for_empty_prompt"] = model.zero_empty_negative
    options[model.family.vae] = model.vae
    pipeline = model.family.pipeline()(
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(model.scheduler_config),
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_concept(pipeline: Any, model: DiffusionModel, concept: Concept) -> None:
    """Load a concept into each text encoder, as diffusers' users do."""
    for encoder, vectors in zip(model.encoders, concept.encoders, strict=True):
        pipeline.load_textual_inversion(
            {concept.placeholder_token: torch.from_numpy(vectors.copy())},
            text_encoder=getattr(pipeline, encoder.spec.folder),
            tokenizer=getattr(pipeline, encoder.spec.tokenizer),
        )


def psnr_db(
    image: Float[np.ndarray, "height width 3"], reference: Float[np.ndarray, "height width 3"]
) -> float:
    """Peak signal-to-noise ratio of images in [0, 1]."""
    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return 10 * math.log10(1 / error) if error else math.inf


def _random_concept(model: DiffusionModel) -> Concept:
    """Vectors in random directions, as long as the rows of the tables are."""
    rng = np.random.default_rng(SEED)
    vectors = [_random_vectors(encoder.token_embedding, rng) for encoder in model.encoders]
    return as_concept(model, torch.cat(vectors, dim=1), placeholder_token=PLACEHOLDER_TOKEN)


def _random_vectors(
    table: Float32[Tensor, "vocab_size dim"], rng: np.random.Generator
) -> Float32[Tensor, "num_vectors dim"]:
    vectors = torch.from_numpy(rng.standard_normal((NUM_VECTORS, table.shape[1]))).float()
    return vectors * table.norm(dim=1).mean() / vectors.norm(dim=1, keepdim=True)
