"""Defects of other loaders of concepts, one by one: each is named, and shown not to be here.

Those of trainers are in test_known_defects_of_trainers.py; the numbers count both together.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.batching.batcher import Batcher, Event, Failed, Finished, ImageDone
from engine.bundle import TextSpec
from engine.concepts import Concept, check_fits, concept_from_bytes
from engine.dialects.readers import read_concepts
from engine.errors import ConceptMismatch, ConceptUnreadable, UnknownConcept
from engine.pipeline import Pipeline
from engine.prompts import EncoderInput, PromptReader
from engine.requests import GenerationRequest, RgbImage
from engine.sessions import OnnxSession
from engine.store.concept_store import ConceptStore
from tests.conftest import ROOT
from tests.fakes import DIM, WAIT_S, FakeDenoiser, make_pipeline
from tests.families import grow
from tests.tiny_model import XL_DIMS, make_tiny_model, make_tiny_xl_model
from trainer.model import DiffusionModel, Encoder, load_model
from trainer.onnx_graphs import export_graph, graphs_of
from trainer.parity import diffusers_pipeline
from trainer.splicing import TemplatePrompts, plain_tokenizer, text_spec
from trainer.text_encoder import PromptEncoder

# float32 through two layers, in two implementations or two runtimes.
ATOL = 1e-5


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    """Its text encoder says `eos_token_id` 2, as that of Stable Diffusion 1.x does."""
    path = tmp_path_factory.mktemp("models") / "sd1"
    return load_model(make_tiny_model(path, sd1_eos_token_id=True))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    """Both text encoders say `eos_token_id` 2, as the second one of SDXL does."""
    path = tmp_path_factory.mktemp("models") / "xl"
    return load_model(make_tiny_xl_model(path, sd1_eos_token_id=True))


@pytest.fixture
def peer(sd1: DiffusionModel) -> Any:
    """diffusers' own pipeline around copies of the same text encoder and tokenizer."""
    return diffusers_pipeline(sd1)


def readers_of(model: DiffusionModel) -> list[PromptReader]:
    return [
        PromptReader(plain_tokenizer(encoder), table_of(encoder), text_spec(encoder), encoder=place)
        for place, encoder in enumerate(model.encoders)
    ]


def table_of(encoder: Encoder) -> np.ndarray:
    return encoder.token_embedding.numpy()


def random_concept(token: str, num_vectors: int, *, dim: int = 24, seed: int = 0) -> Concept:
    vectors = np.random.default_rng(seed).normal(size=(num_vectors, dim)).astype(np.float32)
    return Concept(placeholder_token=token, learned_embeddings=vectors)


def assert_slots_hold(read: EncoderInput, expected: Sequence[Concept], encoder: int = 0) -> None:
    """The slots of a prompt are these concepts', in order, each with all vectors of its own."""
    assert [token for *_, token in read.slots] == [one.placeholder_token for one in expected]
    for (row, first, _), concept in zip(read.slots, expected, strict=True):
        found = read.inputs_embeds[row, first : first + concept.num_vectors]
        np.testing.assert_array_equal(found, concept.encoders[encoder])


# --- D1: unloading one of several words ---


def test_d01_unloading_one_word_leaves_the_others(sd1: DiffusionModel, tmp_path: Path) -> None:
    """diffusers, loaders/textual_inversion.py, `unload_textual_inversion`, slow tokenizers: of A,
    B and C, B is unloaded, C gets the id of A, and draws A.

    Here no word has an id: it is looked up by its name, and its vectors go into the prompt.
    """
    words = [random_concept(f"<{name}>", count, seed=count) for count, name in enumerate("abc", 1)]
    store = ConceptStore(tmp_path)
    for word in words:
        store.import_concept(word)
    (reader,) = readers_of(sd1)

    def read() -> EncoderInput:
        return reader.read("<c> and <a>", [store.find_by_token("<a>"), store.find_by_token("<c>")])

    before = read()
    store.delete("<b>")
    store.close()
    store = ConceptStore(tmp_path)  # nor is it a matter of what was still in memory
    assert_slots_hold(read(), [words[2], words[0]])
    np.testing.assert_array_equal(read().inputs_embeds, before.inputs_embeds)
    with pytest.raises(UnknownConcept, match="'<b>'; stored: <a>, <c>"):
        store.find_by_token("<b>")
    store.close()


# --- D2: an error that prints its own source ---


def test_d02_a_wrong_width_is_told_in_numbers(tmp_path: Path) -> None:
    """diffusers, loaders/textual_inversion.py: the message is no f-string and says literally
    "{input_embeddings.shape[-1]}".

    Here it gives the widths found and wanted, and whose they are.
    """
    save_file({"<x>": torch.ones(1, 768)}, sd1_path := tmp_path / "sd1.safetensors")
    both = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    save_file(both, xl_path := tmp_path / "xl.safetensors")
    ((sd1,), (xl,)) = (read_concepts(path) for path in (sd1_path, xl_path))
    one, two = (text_spec_of_width(dim) for dim in (768, 1280))
    check_fits(sd1, one, model_name="m")
    check_fits(xl, one, text_2=two, model_name="m")
    with pytest.raises(
        ConceptMismatch,
        match=r"width 768 \(as Stable Diffusion 1.x\), model 'm' wants 768 \+ 1280 \(as SDXL\)",
    ):
        check_fits(sd1, one, text_2=two, model_name="m")
    with pytest.raises(
        ConceptMismatch, match=r"width 768 \+ 1280 \(as SDXL\), model 'm' wants 768"
    ):
        check_fits(xl, one, model_name="m")


def text_spec_of_width(dim: int) -> TextSpec:
    return TextSpec(
        max_tokens=77,
        dim=dim,
        output_dim=dim,
        vocab_size=10,
        bos_token_id=8,
        eos_token_id=9,
        pad_token_id=9,
        embedding_fingerprint="a" * 64,
    )


def test_d02_no_text_has_a_placeholder_that_nobody_fills() -> None:
    """The same, for every text in the code."""
    unfilled = re.compile(r"(?<!\\p)\{[A-Za-z_][\w.\[\]()'-]*[!:}]")  # \p{L}: a class of letters
    folders = [ROOT / name for name in ("engine", "trainer", "oneword")]
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    texts = [
        f"{path.name}:{line}: {text}"
        for path in sources
        for line, text in plain_texts(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(texts) > 1000 and [text for text in texts if unfilled.search(text)] == []


def plain_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and value of each string outside the braces of f-strings; no docstrings, no shapes.

    The parts of an f-string count as well: one of several lines may lack its "f".
    """
    others: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            others.update(map(id, ast.walk(node.slice)))
        elif isinstance(node, ast.Expr) or getattr(node, "attr", "") == "format":
            others.add(id(getattr(node, "value", None)))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in others
        ):
            yield node.lineno, node.value


# --- D3: one file for two text encoders ---


def test_d03_one_file_for_two_text_encoders_is_one_word(
    xl: DiffusionModel, peer: Any, tmp_path: Path
) -> None:
    """diffusers, loaders/textual_inversion.py: a file with `clip_l` and `clip_g`, as kohya,
    OneTrainer and its own advanced scripts write it, has an "incorrect" state dictionary.

    Here it is one word, and each text encoder reads its own part.
    """
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn((2, dim), generator=generator) for dim in XL_DIMS]
    tensors = {"clip_l": parts[0], "clip_g": parts[1]}
    save_file(tensors, path := tmp_path / "fox.safetensors")
    (concept,) = read_concepts(path)
    for place, (reader, part) in enumerate(zip(readers_of(xl), parts, strict=True)):
        read = reader.read("a red fox", [concept])
        assert_slots_hold(read, [concept], encoder=place)
        np.testing.assert_array_equal(concept.encoders[place], part.numpy())
    with pytest.raises(ValueError, match="state dictionary is incorrect"):
        peer.load_textual_inversion(tensors)


# --- D4: the key of a tensor taken for the word ---


@pytest.mark.parametrize("key", ["emb_params", "emp_params", "clip_l", "text_encoders_0"])
def test_d04_the_name_of_a_tensor_is_not_the_word(
    sd1: DiffusionModel, peer: Any, key: str, tmp_path: Path
) -> None:
    """diffusers, loaders/textual_inversion.py: of a file with one tensor its key becomes the word,
    so that words of kohya ("emb_params") and OneTrainer ("emp_params") "do nothing".

    Here such a file is called as it is named, as in those tools, and is heard in a prompt.
    """
    vectors = torch.randn((2, 24), generator=torch.Generator().manual_seed(1))
    save_file({key: vectors}, path := tmp_path / "fox.safetensors")
    (concept,) = read_concepts(path)
    (reader,) = readers_of(sd1)
    read = reader.read("a photo of a fox", [concept])
    assert concept.placeholder_token == "fox"
    assert_slots_hold(read, [concept])
    assert (read.inputs_embeds != reader.read("a photo of a fox").inputs_embeds).any()
    peer.load_textual_inversion({key: vectors})
    assert key in peer.tokenizer.get_vocab() and "fox" not in peer.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "key", ["emb_params", "emp_params", "clip_l", "clip_g", "text_encoders_0", "string_to_param"]
)
def test_d04_a_server_that_sees_no_file_name_asks_for_the_word(key: str, tmp_path: Path) -> None:
    """The same, where only the bytes arrive."""
    save_file({key: torch.ones(1, 24)}, path := tmp_path / "fox.safetensors")
    with pytest.raises(ConceptUnreadable, match=rf"'{key}'\); name one") as caught:
        concept_from_bytes(path.read_bytes(), source="upload")
    assert caught.value.field == "placeholder_token"


@pytest.mark.parametrize("key", ["t5", "t5xxl", "clip_l_out", "emp_params_out"])
def test_d04_a_server_refuses_vectors_for_what_no_model_has(key: str, tmp_path: Path) -> None:
    """Not even under a given name: it would draw anything."""
    save_file({key: torch.ones(1, 24)}, path := tmp_path / "fox.safetensors")
    with pytest.raises(ConceptUnreadable, match=rf"holds {key}: vectors for"):
        concept_from_bytes(path.read_bytes(), source="upload", placeholder_token="<fox>")


# --- D5: a name inside another name ---


@pytest.mark.parametrize(
    "prompt", ["sks and sks2", "sks2, sks-toy, sks", "a sks_1 sks2 (sks:1.2)", "sks2sks sks"]
)
@pytest.mark.parametrize("counts", [(2, 3, 1, 2), (1, 1, 2, 1)], ids=str)
def test_d05_a_name_inside_another_name_stays_whole(
    sd1: DiffusionModel, prompt: str, counts: tuple[int, ...]
) -> None:
    """diffusers, loaders/textual_inversion.py, `_maybe_convert_prompt`: words of several vectors
    are put in by `str.replace`, inside longer names as well; and "sks_1" is the second vector of
    "sks" there, so that no other word can be called so.

    Here the words of a prompt are found once, the longest first, and only whole ones.
    """
    names = ("sks", "sks2", "sks_1", "sks-toy")
    known = {
        name: random_concept(name, count, seed=place)
        for place, (name, count) in enumerate(zip(names, counts, strict=True))
    }
    (reader,) = readers_of(sd1)
    read = reader.read(prompt, list(known.values()))
    wanted = [known[word] for word in re.findall(r"[\w-]+", prompt) if word in known]
    assert_slots_hold(read, wanted)
    vectors = np.concatenate([one.learned_embeddings for one in wanted])
    assert vectors_in(read, known.values()) == len(vectors)


def vectors_in(read: EncoderInput, concepts: Any) -> int:
    """How many positions of a prompt hold a vector of one of these concepts."""
    rows = np.concatenate([concept.learned_embeddings for concept in concepts])
    return int((read.inputs_embeds[:, :, None] == rows).all(axis=-1).any(axis=-1).sum())


def test_d05_the_peer_breaks_such_names(peer: Any) -> None:
    """The defect itself, so that the test above is known to ask for something."""
    for name in ("sks", "sks2"):
        peer.load_textual_inversion({name: torch.ones(2, 24)})
    converted = peer.maybe_convert_prompt("sks and sks2", peer.tokenizer)
    assert converted != "sks sks_1 and sks2 sks2_1"


# --- D13: pooling at a placeholder instead of EOS ---


@pytest.mark.parametrize("family", ["sd1", "xl"])
@pytest.mark.parametrize("words", ["cat", "red cat"])
def test_d13_a_word_of_ours_is_pooled_as_a_word_of_the_vocabulary(
    family: str, words: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """transformers' CLIP with `eos_token_id` 2 in its config (Stable Diffusion 1.x, the second
    encoder of SDXL) pools at the largest id, which is no more EOS but the placeholder, wherever a
    vocabulary grows (diffusers issue 10754; transformers issues 21029, 24650).

    Here the position of EOS is an input. A concept with the vectors of real words must be pooled,
    while learning and in the exported graph, as transformers pools the prompt with those words.
    """
    model: DiffusionModel = request.getfixturevalue(family)
    prompt, count = "a photo of {} in the morning", len(words.split())
    rows = [table_of(encoder)[ids_of(encoder, words)[1 : 1 + count]] for encoder in model.encoders]
    concept = Concept(
        placeholder_token="<x>",
        learned_embeddings=rows[0],
        learned_embeddings_2=(*rows, None)[1],
    )
    wanted = [pooled_by_transformers(one, prompt.format(words)) for one in model.encoders]
    for place, (encoder, reader) in enumerate(zip(model.encoders, readers_of(model), strict=True)):
        read = reader.read(prompt.format("<x>"), [concept])
        ids = ids_of(encoder, prompt.format(words))
        assert read.eos_index.tolist() == [int((ids == encoder.eos_token_id).argmax())]
        found = run_exported(model, place, read, tmp_path)
        np.testing.assert_allclose(found["pooled"], wanted[place].numpy(), rtol=0, atol=ATOL)
    pooled = pooled_while_learning(model, prompt, torch.from_numpy(np.concatenate(rows, axis=1)))
    torch.testing.assert_close(pooled, wanted[-1], rtol=0, atol=ATOL)


def ids_of(encoder: Encoder, text: str) -> np.ndarray:
    tokenizer: Any = encoder.tokenizer
    encoded = tokenizer([text], padding="max_length", return_tensors="np")
    return encoded.input_ids[0]


@torch.no_grad()
def pooled_by_transformers(encoder: Encoder, text: str) -> Tensor:
    outputs = encoder.text_encoder(torch.from_numpy(ids_of(encoder, text))[None])
    return outputs.text_embeds if "text_embeds" in outputs else outputs.pooler_output


def run_exported(
    model: DiffusionModel, place: int, read: EncoderInput, folder: Path
) -> dict[str, np.ndarray]:
    graph = graphs_of(model)[place]  # text encoders come first
    export_graph(graph, folder, precision="fp32")
    session = OnnxSession(folder / f"{graph.name}.onnx")
    return session.run({"inputs_embeds": read.inputs_embeds, "eos_index": read.eos_index})


@torch.no_grad()
def pooled_while_learning(model: DiffusionModel, template: str, vectors: Tensor) -> Tensor:
    layouts = TemplatePrompts.lay_out(model, [template], len(vectors)).of_encoders
    parts = vectors.split(model.dims, dim=1)
    which = torch.tensor([0])
    embeds = [one.splice(part, which) for one, part in zip(layouts, parts, strict=True)]
    _, pooled = PromptEncoder.of(model)(embeds, [one.eos_index for one in layouts])
    return pooled


def test_d13_the_peer_pools_at_the_placeholder(tmp_path: Path) -> None:
    """The defect itself: the same row of the table under a new id, and another pooled vector."""
    encoder = load_model(make_tiny_model(tmp_path, sd1_eos_token_id=True)).encoders[0]
    wanted = pooled_by_transformers(encoder, "a photo of cat in the morning")
    (_, cat, *_) = ids_of(encoder, "cat")
    grow(encoder.text_encoder, encoder.tokenizer, ["<x>"], encoder.token_embedding[[cat]])
    found = pooled_by_transformers(encoder, "a photo of <x> in the morning")
    # Both are layer-normalized, so of magnitude 1: these are different tokens.
    assert float((found - wanted).abs().max()) > 0.1


# --- D14: vectors dropped in silence, and a table that is swapped for a request ---


def test_d14_a_word_that_does_not_fit_is_refused_and_not_left_out() -> None:
    """ComfyUI, comfy/sd1_clip.py: a vector of another width is logged and dropped, and the prompt
    is drawn without the word.

    Here the request is refused, whatever else it has.
    """
    pipeline = make_pipeline(FakeDenoiser())
    fits = random_concept("<a>", 1, dim=DIM)
    wide = random_concept("<b>", 1, dim=DIM + 1)
    for concepts in ([fits, wide], [wide, fits]):
        request = GenerationRequest(prompt="<a> photo of <b>", concepts=tuple(concepts))
        with pytest.raises(ConceptMismatch, match=rf"'<b>' has .* width {DIM + 1}, .*wants {DIM};"):
            pipeline.plan(request)


def test_d14_requests_at_the_same_time_have_their_own_words() -> None:
    """ComfyUI, comfy/sd1_clip.py: for each prompt with a word in it the whole embedding table is
    copied, and the copy is put into the shared text encoder until the prompt is encoded.

    Here two requests call different vectors by one name, share calls of the denoiser, and draw
    what each draws alone; the table is only read.
    """
    denoiser = FakeDenoiser()
    pipeline = make_pipeline(denoiser)
    table = pipeline.reader._token_embedding
    before = table.tobytes()
    requests = [
        GenerationRequest(
            prompt="a <x>",
            concepts=(random_concept("<x>", 2, dim=DIM, seed=seed),),
            seed=5,
            num_inference_steps=6,
        )
        for seed in range(2)
    ]
    alone = [draw(pipeline, [request])[0] for request in requests]
    calls, denoiser.num_calls = denoiser.num_calls, 0
    denoiser.gate.clear()  # the first call waits until both requests are there
    together = draw(pipeline, requests, open_gate=denoiser)
    assert calls == 12 and denoiser.num_calls < calls
    for found, expected in zip(together, alone, strict=True):
        # An image is the same, to rounding, whatever shares its call.
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.abs(alone[0].astype(int) - alone[1]).max() > 10
    assert pipeline.reader._token_embedding is table and table.tobytes() == before


def draw(
    pipeline: Pipeline,
    requests: Sequence[GenerationRequest],
    *,
    open_gate: FakeDenoiser | None = None,
) -> list[RgbImage]:
    """One image of each request, all handed in before any is waited for."""
    batcher = Batcher(pipeline)
    events: list[list[Event]] = [[] for _ in requests]
    for request, heard in zip(requests, events, strict=True):
        batcher.submit(pipeline.plan(request), heard.append)
    if open_gate is not None:
        open_gate.gate.set()
    batcher.close(grace_s=WAIT_S)
    assert not any(isinstance(event, Failed) for heard in events for event in heard)
    assert all(isinstance(heard[-1], Finished) for heard in events)
    return [event.image for heard in events for event in heard if isinstance(event, ImageDone)]


def test_d14_threads_read_prompts_side_by_side(sd1: DiffusionModel) -> None:
    """The same, where prompts are read: eight threads, one reader, one name, eight concepts."""
    (reader,) = readers_of(sd1)
    start = Barrier(8)

    def read_many(seed: int) -> None:
        concept = random_concept("<x>", 1 + seed, seed=seed)
        start.wait(WAIT_S)
        for _ in range(50):
            assert_slots_hold(reader.read("a <x> and <x>", [concept]), [concept, concept])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read_many, range(8)))
