"""The runtime against diffusers and transformers, on the embedded model, image for image."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from engine.batching.batcher import Batcher, generate
from engine.concepts import Concept, write_concept
from engine.errors import ConceptMismatch, InvalidRequest
from engine.images import decode_image
from engine.pipeline import ImageInFlight, Pipeline
from engine.requests import GenerationRequest, RgbImage
from engine.sessions import OnnxSession
from engine.store.concept_store import ConceptStore
from tests.conftest import EMOJI_MODEL, ROOT

# What a user writes in diffusers for each of our samplers; `_karras` adds use_karras_sigmas.
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
KARRAS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis", "lms")
ALL_SAMPLERS = [*SCHEDULERS, *(f"{name}_karras" for name in KARRAS)]
PROMPT = "a photo of <x> on a blue background"

# The bar that the product promises. What is left is float32 rounding in two implementations of the
# same network, amplified by the sampler; 8-bit output alone would allow 59 dB.
MIN_PSNR_DB = 40.0


def psnr(ours: RgbImage, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit against float RGB in [0, 1]."""
    error = ((ours.astype(np.float64) / 255.0 - reference) ** 2).mean()
    return float(10 * np.log10(1.0 / error))


def random_concept(token: str, num_vectors: int, dim: int, *, seed: int = 0) -> Concept:
    """Vectors of the size that words have (median norm 0.23), so that the word says something."""
    vectors = np.random.default_rng(seed).normal(0, 1, (num_vectors, dim)).astype(np.float32)
    return Concept(
        placeholder_token=token,
        learned_embeddings=0.23 * vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
    )


@pytest.fixture(scope="module")
def concept(pipeline: Pipeline) -> Concept:
    return random_concept("<x>", 2, pipeline.bundle.manifest.text.dim)


@pytest.fixture(scope="module")
def reference(concept: Concept, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers with the same model and the concept loaded from our export."""
    path = tmp_path_factory.mktemp("diffusers") / "learned_embeds.safetensors"
    write_concept(concept, path, "diffusers")
    pipe = StableDiffusionPipeline.from_pretrained(
        EMOJI_MODEL, safety_checker=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(str(path))
    return pipe


def scheduler(name: str, config: Any) -> Any:
    kind, options = SCHEDULERS[name.removesuffix("_karras")]
    karras = {"use_karras_sigmas": True} if name.endswith("_karras") else {}
    return begin_at_the_first_step(kind.from_config(config, **options, **karras))


def begin_at_the_first_step(scheduler: Any) -> Any:
    """Karras sigmas can round to the same timestep twice; diffusers' text-to-image pipeline then
    looks the first step up, finds the second, and runs off the end of its own schedule."""
    if not hasattr(scheduler, "set_begin_index"):
        return scheduler
    set_timesteps = scheduler.set_timesteps

    def set_timesteps_and_begin(*arguments: Any, **options: Any) -> None:
        set_timesteps(*arguments, **options)
        scheduler.set_begin_index(0)

    scheduler.set_timesteps = set_timesteps_and_begin
    return scheduler


@pytest.fixture(scope="module")
def batcher(pipeline: Pipeline) -> Iterator[Batcher]:
    batcher = Batcher(pipeline)
    yield batcher
    batcher.close()


def draw(pipeline: Pipeline, batcher: Batcher, request: GenerationRequest) -> list[RgbImage]:
    images, _ = generate(batcher, pipeline.plan(request))
    return [image.image for image in images]


# The same image as diffusers --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_SAMPLERS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_same_image_as_diffusers(
    pipeline: Pipeline, batcher: Batcher, reference: Any, concept: Concept, name: str
) -> None:
    reference.scheduler = scheduler(name, DDIMScheduler.load_config(EMOJI_MODEL / "scheduler"))
    expected = reference(
        PROMPT,
        negative_prompt="red",
        num_inference_steps=12,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(7),
        # TCD's own default; the pipeline would pass 0 and make it deterministic.
        eta=0.3 if name == "tcd" else 0.0,
        output_type="np",
    ).images[0]
    (ours,) = draw(
        pipeline,
        batcher,
        GenerationRequest(
            prompt=PROMPT,
            negative_prompt="red",
            concepts=(concept,),
            seed=7,
            sampler=name,
            num_inference_steps=12,
            guidance_scale=4.0,
        ),
    )
    assert psnr(ours, expected) >= MIN_PSNR_DB
    assert ours.std() > 5, "a flat picture agrees with anything"


@pytest.mark.parametrize("name", ["ddim", "euler_a", "heun", "dpmpp_2m", "unipc", "lms", "pndm"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_same_image_to_image_as_diffusers(
    pipeline: Pipeline, batcher: Batcher, reference: Any, concept: Concept, name: str
) -> None:
    picture = decode_image((ROOT / "examples/concepts/fox/0.png").read_bytes())
    side = pipeline.bundle.manifest.latents.default_size
    picture = np.asarray(Image.fromarray(picture).resize((side, side)))
    image_to_image: Any = StableDiffusionImg2ImgPipeline(
        **reference.components, requires_safety_checker=False
    )
    image_to_image.set_progress_bar_config(disable=True)
    config = DDIMScheduler.load_config(EMOJI_MODEL / "scheduler")
    image_to_image.scheduler = scheduler(name, config)
    expected = image_to_image(
        PROMPT,
        image=Image.fromarray(picture),
        strength=0.6,
        num_inference_steps=15,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images[0]
    request = GenerationRequest(
        prompt=PROMPT,
        concepts=(concept,),
        seed=3,
        sampler=name,
        num_inference_steps=15,
        guidance_scale=3.0,
        init_image=picture,
        strength=0.6,
    )
    assert psnr(draw(pipeline, batcher, request)[0], expected) >= MIN_PSNR_DB


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_other_sizes_and_no_guidance(
    pipeline: Pipeline, batcher: Batcher, reference: Any, concept: Concept
) -> None:
    multiple = pipeline.bundle.manifest.latents.size_multiple
    width, height = 5 * multiple, 3 * multiple
    reference.scheduler = scheduler("ddim", DDIMScheduler.load_config(EMOJI_MODEL / "scheduler"))
    expected = reference(
        "<x>",
        width=width,
        height=height,
        num_inference_steps=5,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(2**63),
        output_type="np",
    ).images[0]
    (ours,) = draw(
        pipeline,
        batcher,
        GenerationRequest(
            prompt="<x>",
            concepts=(concept,),
            width=width,
            height=height,
            num_inference_steps=5,
            guidance_scale=1.0,
            seed=2**63,
        ),
    )
    assert ours.shape == (height, width, 3)
    assert psnr(ours, expected) >= MIN_PSNR_DB


# The same text encoder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "num_vectors"),
    [
        ("a photo of <x>", (1, 1)),
        ("a <x> beside <y> on a red background", (3, 2)),
        ("a dog and " * 14 + "<x>", (4, 1)),
        ("a red cat, " * 14 + "<y> and <x> " + "a dog " * 10, (2, 5)),
    ],
    ids=["one", "several", "two chunks", "three chunks"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_same_prompt_embeds_as_transformers(
    pipeline: Pipeline, prompt: str, num_vectors: tuple[int, int]
) -> None:
    dim = pipeline.bundle.manifest.text.dim
    concepts = [
        random_concept(token, count, dim, seed=seed)
        for seed, (token, count) in enumerate(zip(("<x>", "<y>"), num_vectors, strict=True))
    ]
    read = pipeline.reader.read(prompt, concepts)
    ours = pipeline._text_encoders[0]._session.run(
        {"inputs_embeds": read.inputs_embeds, "eos_index": read.eos_index}
    )
    hidden, pooled = transformers_outputs(prompt, concepts, read.report.num_chunks)
    # float32 through a few layers in two runtimes.
    np.testing.assert_allclose(ours["prompt_embeds"], hidden, atol=1e-5)
    np.testing.assert_allclose(ours["pooled"], pooled, atol=1e-5)


def transformers_outputs(
    prompt: str, concepts: list[Concept], num_chunks: int
) -> tuple[np.ndarray, np.ndarray]:
    """The long way: grow the tokenizer and the table, write the vectors in, run chunk by chunk."""
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI_MODEL / "tokenizer")
    model = CLIPTextModel.from_pretrained(EMOJI_MODEL / "text_encoder", dtype=torch.float32).eval()
    for concept in concepts:
        names = [f"{concept.placeholder_token}_{i}" for i in range(concept.num_vectors)]
        tokenizer.add_tokens(names)
        model.resize_token_embeddings(len(tokenizer))
        table: torch.Tensor = model.get_input_embeddings().weight.data  # pyright: ignore
        table[-len(names) :] = torch.from_numpy(concept.learned_embeddings)
        prompt = prompt.replace(concept.placeholder_token, " ".join(names))
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    room = tokenizer.model_max_length - 2
    chunks = split_whole(ids, room, tokenizer, concepts)
    assert len(chunks) == num_chunks
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [[bos, *chunk, eos] + [eos] * (room - len(chunk)) for chunk in chunks]
    with torch.no_grad():
        outputs = model(torch.tensor(rows))
    return outputs.last_hidden_state.numpy(), outputs.pooler_output.numpy()


def split_whole(
    ids: list[int], room: int, tokenizer: Any, concepts: list[Concept]
) -> list[list[int]]:
    """Cut token ids into chunks without dividing the tokens of a concept."""
    lengths = {
        tokenizer.convert_tokens_to_ids(f"{c.placeholder_token}_0"): c.num_vectors for c in concepts
    }
    chunks: list[list[int]] = [[]]
    position = 0
    while position < len(ids):
        length = lengths.get(ids[position], 1)
        if len(chunks[-1]) + length > room:
            chunks.append([])
        chunks[-1] += ids[position : position + length]
        position += length
    return chunks


# An image does not depend on its batch ----------------------------------------------------------


MIXED = (
    GenerationRequest(prompt="a red dog", seed=1, sampler="ddim", num_inference_steps=9),
    GenerationRequest(prompt="a <x>", seed=2, sampler="euler_a", num_inference_steps=5),
    GenerationRequest(prompt="", seed=3, sampler="dpmpp_2m_sde_karras", num_inference_steps=7,
                      guidance_scale=2.0),
    GenerationRequest(prompt="<x> cat", seed=4, sampler="heun", num_inference_steps=4,
                      guidance_scale=1.0),
    GenerationRequest(prompt="a blue fish", seed=5, sampler="unipc", num_inference_steps=6,
                      negative_prompt="green"),
    GenerationRequest(prompt="a house " * 20, seed=6, sampler="pndm", num_inference_steps=6),
)  # fmt: skip


def test_an_image_does_not_depend_on_its_batch(pipeline: Pipeline, concept: Concept) -> None:
    alone = [run_to_end(pipeline, [begin(pipeline, concept, r)])[0] for r in MIXED]
    waiting = [begin(pipeline, concept, request) for request in MIXED]
    together, in_flight = list(waiting), [waiting.pop(0)]
    while in_flight:
        step_all(pipeline, in_flight)
        in_flight = [image for image in in_flight if not image.is_done]
        if waiting:  # one joins at every step, in mid-flight
            in_flight.append(waiting.pop(0))
    for one, other in zip(alone, together, strict=True):
        scale = np.abs(one).max()
        # Kernels may sum in another order for another batch size; nothing else may differ.
        np.testing.assert_allclose(other.latents / scale, one / scale, atol=1e-4)


def begin(pipeline: Pipeline, concept: Concept, request: GenerationRequest) -> ImageInFlight:
    return pipeline.begin(pipeline.plan(dataclasses.replace(request, concepts=(concept,))))[0]


def step_all(pipeline: Pipeline, images: list[ImageInFlight]) -> None:
    groups: dict[tuple[int, ...], list[ImageInFlight]] = {}
    for image in images:
        groups.setdefault(image.shape_key, []).append(image)
    for group in groups.values():
        pipeline.step(group)


def run_to_end(pipeline: Pipeline, images: list[ImageInFlight]) -> list[np.ndarray]:
    while not all(image.is_done for image in images):
        pipeline.step(images)
    return [image.latents for image in images]


def test_images_of_a_request_are_those_of_its_seeds(
    pipeline: Pipeline, batcher: Batcher, concept: Concept
) -> None:
    def request(seed: int, num_images: int) -> GenerationRequest:
        return GenerationRequest(
            prompt="<x>",
            concepts=(concept,),
            seed=seed,
            num_images=num_images,
            num_inference_steps=4,
            sampler="euler_a",
        )

    together = draw(pipeline, batcher, request(40, 3))
    alone = draw(pipeline, batcher, request(42, 1))[0]
    # 8-bit output: rounding may tip a value over an edge.
    assert np.abs(together[2].astype(int) - alone.astype(int)).max() <= 1


# No rebuild -------------------------------------------------------------------------------------


def test_a_thousand_concepts_share_the_sessions(
    emoji_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    class CountedSession(OnnxSession):
        def __init__(self, model_path: Path, **options: Any) -> None:
            opened.append(model_path)
            super().__init__(model_path, **options)

    monkeypatch.setattr("engine.bundle.OnnxSession", CountedSession)
    pipeline = Pipeline.open(emoji_bundle_path)
    batcher, store = Batcher(pipeline), ConceptStore.temporary()
    dim = pipeline.bundle.manifest.text.dim
    table = pipeline.bundle.token_embedding.tobytes()
    for index in range(1000):
        store.import_concept(random_concept(f"<c{index}>", 1, dim, seed=index))
    pictures = {
        draw(
            pipeline,
            batcher,
            GenerationRequest(
                prompt=f"a <c{index}>",
                concepts=(store.find_by_token(f"<c{index}>"),),
                num_inference_steps=2,
            ),
        )[0].tobytes()
        for index in range(0, 1000, 10)
    }
    batcher.close()
    store.close()
    assert len(pictures) == 100, "every word must change the picture"
    assert len(opened) == len(pipeline.bundle.manifest.components), "once, and never again"
    assert pipeline.bundle.token_embedding.tobytes() == table


def test_the_engine_works_without_pytorch(emoji_bundle_path: Path) -> None:
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "trainer"):
    sys.modules[name] = None                     # importing it raises ImportError
from pathlib import Path
from engine.batching.batcher import Batcher, generate
from engine.pipeline import Pipeline
from engine.requests import GenerationRequest
import engine.serving.server, engine.client, oneword.cli
pipeline = Pipeline.open(Path(sys.argv[1]))
batcher = Batcher(pipeline)
plan = pipeline.plan(GenerationRequest(prompt="a dog", num_inference_steps=2))
images, _ = generate(batcher, plan)
batcher.close()
print(images[0].image.shape)
"""
    command = [sys.executable, "-c", code, str(emoji_bundle_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(64, 64, 3)"


def test_the_largest_size_that_is_accepted_is_served(pipeline: Pipeline, batcher: Batcher) -> None:
    largest = pipeline.limits.max_pixels
    assert largest
    side = int(largest**0.5)
    request = GenerationRequest(
        prompt="a dog", width=side, height=side, num_inference_steps=1, num_images=2
    )
    assert [image.shape for image in draw(pipeline, batcher, request)] == [(side, side, 3)] * 2
    wider = side + pipeline.bundle.manifest.latents.size_multiple
    with pytest.raises(InvalidRequest, match=f"at most {largest} pixels, got {wider} x {side}"):
        pipeline.plan(dataclasses.replace(request, width=wider))


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_inference_steps": 0}, "between 1 and 100, got 0"),
        ({"num_inference_steps": 10**9}, "between 1 and 100, got 1000000000"),
        ({"width": 7}, "width must be between"),
        ({"height": 10**6}, "height must be between"),
        ({"width": 65}, "multiple of"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be between 0 and 100, got nan"),
        ({"guidance_scale": float("inf")}, "got inf"),
        ({"seed": 2**64}, "seed must be between 0 and 18446744073709551615"),
        ({"seed": -1}, "got -1"),
        ({"sampler": "magic"}, "unknown sampler 'magic'; known: ddim"),
        ({"num_images": 0}, "num_images must be between 1 and 16, got 0"),
        ({"num_images": 10**6}, "got 1000000"),
        ({"prompt": "x" * 10**6}, "1000000 characters"),
        ({"strength": 0.0, "init_image": np.zeros((64, 64, 3), np.uint8)}, "strength"),
        ({"strength": float("nan"), "init_image": np.zeros((64, 64, 3), np.uint8)}, "strength"),
        ({"init_image": np.zeros((3, 64, 3), np.uint8)}, "height must be between"),
    ],
)
def test_bad_requests_are_refused_with_value_and_limit(
    pipeline: Pipeline, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline.plan(dataclasses.replace(GenerationRequest(prompt="a dog"), **fields))


def test_a_concept_of_another_model_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ConceptMismatch, match="width 768"):
        pipeline.plan(GenerationRequest(prompt="<x>", concepts=(random_concept("<x>", 1, 768),)))
