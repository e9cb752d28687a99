"""The parity gate: no bundle is published that does not draw what diffusers draws.

Each graph runs in ONNX Runtime at sizes other than those it was traced with and is compared with
its float32 PyTorch module; then the runtime draws a whole image with a concept in it, and the
family's diffusers pipeline draws the same image with the concept loaded its own way.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from trainer.activations import FLOAT16_MAX, HEADROOM, LargestActivation, largest_activation
from trainer.component_memory import Residence, SessionsInTurn, free_memory
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
    # Component -> why it is float32 in a float16 bundle, which it was tried in first.
    float32_islands: dict[str, str] = field(default_factory=dict[str, str])

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a graph's float32 module gives, at sizes other than those traced."""

    cases: list[tuple[dict[str, int], Feeds, list[Array]]]  # sizes, inputs, outputs in order
    largest: LargestActivation  # 0 where it was not looked for


def record_reference(graph: Graph, *, activations: bool = False) -> Reference:
    """Run the module with batches of 1, 2 and 3 of several sizes; with a look inside, if wanted."""
    with torch.no_grad(), ExitStack() as stack:
        largest = stack.enter_context(largest_activation(graph.module)) if activations else None
        cases = [_reference_case(graph, *case) for case in enumerate(_checked_sizes(graph))]
        return Reference(cases=cases, largest=largest() if largest else LargestActivation(0.0, ""))


def _reference_case(
    graph: Graph, seed: int, sizes: dict[str, int]
) -> tuple[dict[str, int], Feeds, list[Array]]:
    inputs = graph.random_inputs(sizes, seed)
    outputs = graph.module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    feeds = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
    return sizes, feeds, [output.numpy() for output in outputs]


def component_errors(
    graph: Graph, session: Session, reference: Reference | None = None
) -> dict[str, float]:
    """The largest relative error of each output over all cases of the reference."""
    reference = reference or record_reference(graph)
    errors = dict.fromkeys(graph.outputs, 0.0)
    for sizes, feeds, expected in reference.cases:
        outputs = _run(graph, session, feeds, sizes)
        for name, wanted in zip(graph.outputs, expected, strict=True):
            error = _relative_error(outputs[name], wanted)
            errors[name] = error if math.isnan(error) else max(errors[name], error)
    return errors


def check_component(graph: Graph, errors: dict[str, float], precision: str) -> None:
    """Raise `ParityError` if a graph of this precision is outside its tolerance."""
    parity = Parity(max_relative_error={graph.name: errors}, image_psnr_db=math.inf)
    parity.check({graph.name: precision}, precision)


def reason_for_float32(reference: Reference, errors: dict[str, float]) -> str | None:
    """Why a graph that was tried in float16 must not be; None if it may."""
    if not reference.largest.fits_float16:
        return (
            f"numbers reach {reference.largest}; float16 ends at {FLOAT16_MAX:.0f}, and a factor "
            f"of {HEADROOM:.0f} is kept free"
        )
    limit = MAX_RELATIVE_ERROR["fp16"]
    wrong = [
        f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= limit
    ]
    return f"{', '.join(wrong)} of its range (limit {limit:.0e})" if wrong else None


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


def measure_image(bundle: Bundle, model: DiffusionModel, residence: Residence) -> float:
    """PSNR between the runtime's image and diffusers', same prompt, seed, concept and steps.

    diffusers' model is out of memory before the bundle's graphs are read, and those one at a time.
    """
    request = _image_request(bundle, model)
    with residence.of(*model.modules):
        reference = draw_with_diffusers(model, request)
    free_memory()  # the pipeline has cycles
    sessions = SessionsInTurn(tuple(bundle.manifest.components), bundle.open_session)
    pipeline = Pipeline(bundle, dict(sessions), limits=Limits())
    images = pipeline.begin(pipeline.plan(request))
    while not images[0].is_done:
        pipeline.step(images)
    image = sound(pipeline.decode(images))[0] / 255.0
    sessions.close()
    return psnr_db(image, reference)


def _image_request(bundle: Bundle, model: DiffusionModel) -> GenerationRequest:
    spec = bundle.manifest.latents
    return GenerationRequest(
        prompt=f"a photo of {PLACEHOLDER_TOKEN}, in the morning",
        negative_prompt="a drawing" if model.family.takes_negative_prompt else "",
        concepts=(_random_concept(model),),
        height=2 * spec.size_multiple,
        width=3 * spec.size_multiple,
        seed=SEED,
        sampler="ddim",
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
    )


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

    Tokenizers and the tables of text encoders are copied: loading a concept there adds to both.
    """
    options = dict(model.family.pipeline_options)
    for encoder in model.encoders:
        text_encoder = _with_table_of_its_own(encoder.text_encoder)
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


def _with_table_of_its_own(text_encoder: Any) -> Any:
    """A copy that shares all weights but the token embeddings."""
    own = {id(weight) for weight in text_encoder.get_input_embeddings().parameters()}
    shared = {id(weight): weight for weight in text_encoder.parameters() if id(weight) not in own}
    return copy.deepcopy(text_encoder, shared)


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
