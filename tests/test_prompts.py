"""Prompts: placeholders, weights, chunks and what is reported of them."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from engine.bundle import TextSpec
from engine.concepts import Concept
from engine.errors import InvalidRequest, PromptTooLong, UnknownConcept
from engine.prompt_syntax import (
    _SYNTAX,
    Piece,
    find_placeholders,
    named_placeholders,
    parse_prompt,
)
from engine.prompts import EncoderInput, PromptReader, apply_weights
from tests.conftest import EMOJI_MODEL

DIM = 4


def concept(token: str = "<x>", num_vectors: int = 1, value: float = 9.0) -> Concept:
    vectors = np.full((num_vectors, DIM), value, np.float32)
    vectors += np.arange(num_vectors, dtype=np.float32)[:, None]
    return Concept(placeholder_token=token, learned_embeddings=vectors)


@pytest.fixture(scope="module")
def text() -> TextSpec:
    config = json.loads((EMOJI_MODEL / "text_encoder" / "config.json").read_text())
    return TextSpec(
        max_tokens=config["max_position_embeddings"],
        dim=DIM,
        output_dim=DIM,
        vocab_size=config["vocab_size"],
        bos_token_id=config["bos_token_id"],
        eos_token_id=config["eos_token_id"],
        pad_token_id=0,
        embedding_fingerprint="0" * 64,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(EMOJI_MODEL / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@pytest.fixture(scope="module")
def reader(text: TextSpec, tokenizer: Tokenizer) -> PromptReader:
    table = np.arange(text.vocab_size, dtype=np.float32)[:, None] * np.ones(DIM, np.float32)
    return PromptReader(tokenizer, table, text, max_chunks=3)


def slots_of(read: EncoderInput, value: float = 9.0) -> list[tuple[int, int]]:
    return [(int(r), int(c)) for r, c in np.argwhere(read.inputs_embeds[..., 0] == value)]


# Placeholders ---------------------------------------------------------------------------------


def test_the_longest_placeholder_wins() -> None:
    assert find_placeholders("a <cat-toy>", ["<cat>", "<cat-toy>"]) == [(2, 11, "<cat-toy>")]


def test_a_placeholder_is_not_found_inside_a_longer_name() -> None:
    assert find_placeholders("a <cat-toy>", ["<cat>"]) == []


def test_a_word_is_not_found_inside_another_word() -> None:
    assert find_placeholders("cats concat cat", ["cat"]) == [(12, 15, "cat")]


def test_a_name_contained_in_another_does_not_break_it() -> None:
    found = [token for *_, token in find_placeholders("sks sks2 and sks", ["sks", "sks2"])]
    assert found == ["sks", "sks2", "sks"]


def test_a_backslash_makes_plain_text_of_a_placeholder() -> None:
    assert find_placeholders("\\<x> <x>", ["<x>"]) == [(5, 8, "<x>")]
    assert named_placeholders("\\<x> and <y>") == ["<y>"]


def test_an_unknown_placeholder_is_refused_with_what_is_known() -> None:
    with pytest.raises(UnknownConcept, match=r"<cat-toi>.*known to this request: <cat-toy>"):
        parse_prompt("a photo of <cat-toi>", {"<cat-toy>": concept("<cat-toy>")})


@pytest.mark.parametrize(("backslashes", "found"), [(0, 1), (1, 0), (2, 1), (3, 0), (4, 1)])
def test_only_an_odd_number_of_backslashes_escapes(backslashes: int, found: int) -> None:
    prompt = "a " + "\\" * backslashes + "<x>"
    start = len(prompt) - 3
    assert find_placeholders(prompt, ["<x>"]) == [(start, start + 3, "<x>")] * found
    assert named_placeholders(prompt) == ["<x>"] * found


def test_an_escaped_backslash_stands_before_its_concept() -> None:
    pieces = parse_prompt("a \\\\<x>", {"<x>": concept()})
    assert [(p.text, p.concept is not None) for p in pieces] == [("a \\", False), ("<x>", True)]


@pytest.mark.parametrize("text", ["a < b", "I <3 you", "x<y", "-> <-"])
def test_angle_brackets_of_prose_are_no_placeholders(text: str) -> None:
    assert named_placeholders(text) == []


# Weights: what AUTOMATIC1111's documented examples give -----------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("\\(literal\\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a [less] b", [("a ", 1.0), ("less", 1 / 1.1), (" b", 1.0)]),
        ("(a (house:1.3) [on] b)", [("a ", 1.1), ("house", 1.43), (" ", 1.1), ("on", 1.0),
                                    (" b", 1.1)]),
        ("ratio 3:2) end", [("ratio 3:2) end", 1.0)]),
        ("", []),
    ],
)  # fmt: skip
def test_weights_are_read_as_the_field_writes_them(
    prompt: str, expected: list[tuple[str, float]]
) -> None:
    pieces = parse_prompt(prompt, {})
    assert [piece.text for piece in pieces] == [text for text, _ in expected]
    np.testing.assert_allclose([p.weight for p in pieces], [w for _, w in expected], rtol=1e-12)


def test_a_concept_takes_the_weight_of_its_brackets() -> None:
    pieces = parse_prompt("a (photo of <x>:1.5)", {"<x>": concept()})
    assert [(p.text, p.weight, p.concept is not None) for p in pieces] == [
        ("a ", 1.0, False),
        ("photo of ", 1.5, False),
        ("<x>", 1.5, True),
    ]


@pytest.mark.parametrize("weight", ["nan", "inf", "1e30", "-11"])
def test_a_weight_that_is_no_sane_number_is_refused(weight: str) -> None:
    with pytest.raises(InvalidRequest, match="between -10 and 10"):
        parse_prompt(f"(word:{weight})", {})


@pytest.mark.parametrize("weight", ["1.2000000000000002", " 1.2 ", "+.5", "2.", "1e-1"])
def test_a_weight_is_read_as_python_prints_it(weight: str) -> None:
    assert [p.weight for p in parse_prompt(f"(word:{weight})", {})] == [float(weight)]


@pytest.mark.parametrize("weight", ["1" * 21, "1." + "1" * 21, "1" + " " * 9, "\u0131nf"])
def test_what_is_no_weight_stays_text(weight: str) -> None:
    assert [(p.text, p.weight) for p in parse_prompt(f"(word:{weight})", {})] == [
        (f"word:{weight}", 1.1)
    ]


@pytest.mark.parametrize("number", ["1", "1." + "1", "1e" + "1", " "])
def test_every_repetition_in_a_weight_is_bounded(number: str) -> None:
    # A million digits or blanks: hours where a failed match costs the square of its length.
    text = ":" + number + number[-1] * 1_000_000
    assert "".join(match.group() for match in _SYNTAX.finditer(text)) == text


def test_closing_brackets_scales_each_piece_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Piece] = []

    def count(*args: Any) -> Piece:
        made.append(Piece(*args))
        return made[-1]

    monkeypatch.setattr("engine.prompt_syntax.Piece", count)
    pieces = parse_prompt("(a" * 20 + "[b]" * 100 + ")" * 20, {})
    assert len(made) == len(pieces)


@pytest.mark.parametrize("prompt", ["([" * 32, "(" * 32 + "[" * 32])
def test_brackets_are_nested_to_a_limit(prompt: str) -> None:
    # Each round bracket undoes a square one, up to the rounding of 64 products.
    assert [p.weight for p in parse_prompt(f"{prompt}a", {})] == [pytest.approx(1.0)]
    with pytest.raises(InvalidRequest, match=r"65 nested brackets at character 64.*64; close some"):
        parse_prompt(f"{prompt}[a", {})


def test_brackets_one_after_another_are_not_nested() -> None:
    assert len(parse_prompt("(a) b " * 3000, {})) == 6000


@pytest.mark.parametrize("prompt", ["((a:5):3)", "(" * 25 + "a", "([a:b](c:-9):2)"])
def test_nested_weights_keep_the_limit_of_a_single_one(prompt: str) -> None:
    with pytest.raises(InvalidRequest, match=r"multiply to .* between -10 and 10; take some"):
        parse_prompt(prompt, {})


def test_a_large_weight_may_be_undone_by_those_around_it() -> None:
    assert [p.weight for p in parse_prompt("((a:10):0.5)", {})] == [5.0]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("(a:11)", InvalidRequest),
        ("((a:5):5)", InvalidRequest),
        ("[" * 65, InvalidRequest),
        ("a" * 20_001, PromptTooLong),
    ],
)
def test_errors_call_the_prompt_by_its_field(
    reader: PromptReader, prompt: str, error: type[InvalidRequest]
) -> None:
    with pytest.raises(error, match="negative_prompt.*;") as caught:
        reader.read(prompt, field="negative_prompt")
    assert caught.value.field == "negative_prompt"


def test_an_unknown_concept_is_looked_for_in_the_right_prompt(reader: PromptReader) -> None:
    with pytest.raises(UnknownConcept, match="'<y>' in negative_prompt;"):
        reader.read("<y>", field="negative_prompt")


def test_weighting_multiplies_tokens_and_restores_the_mean() -> None:
    hidden = np.random.default_rng(0).normal(1.0, 1.0, (2, 5, 8)).astype(np.float32)
    weights = np.ones((2, 5), np.float32)
    weights[0, 2] = 1.5
    weighted = apply_weights(hidden, weights)
    raw = hidden[0] * weights[0][:, None]
    np.testing.assert_allclose(weighted[0], raw * (hidden[0].mean() / raw.mean()), rtol=1e-5)
    # The mean is restored chunk by chunk: the other chunk does not notice (rounding of mean/mean).
    np.testing.assert_allclose(weighted[1], hidden[1], rtol=1e-6)


# Chunks -----------------------------------------------------------------------------------------


def test_plain_text_is_tokenized_as_the_tokenizer_does(
    reader: PromptReader, tokenizer: Tokenizer, text: TextSpec
) -> None:
    read = reader.read("a photo of a red dog")
    ids = tokenizer.encode("a photo of a red dog", add_special_tokens=False).ids
    expected = [text.bos_token_id, *ids, text.eos_token_id]
    expected += [text.pad_token_id] * (text.max_tokens - len(expected))
    assert read.input_ids.tolist() == [expected]
    assert read.eos_index.tolist() == [1 + len(ids)]
    assert read.report.num_tokens == len(ids)
    assert read.report.cut == ""


def test_multi_vector_concept_fills_consecutive_positions(reader: PromptReader) -> None:
    read = reader.read("<x> dog", [concept(num_vectors=3)])
    assert read.inputs_embeds[0, 1:4, 0].tolist() == [9.0, 10.0, 11.0]
    assert read.slots == ((0, 1, "<x>"),)
    assert [c.placeholder_token for c in read.report.matched] == ["<x>"]


def test_a_concept_is_not_divided_between_chunks(reader: PromptReader, text: TextSpec) -> None:
    room = text.max_tokens - 2
    read = reader.read("dog " * (room - 1) + "<x>", [concept(num_vectors=2)])
    assert read.report.num_chunks == 2
    assert read.slots == ((1, 1, "<x>"),)
    assert read.eos_index.tolist() == [room, 3]


def test_a_long_prompt_continues_in_the_next_chunk(reader: PromptReader, text: TextSpec) -> None:
    room = text.max_tokens - 2
    read = reader.read("dog " * room + "cat")
    assert read.report.num_chunks == 2
    assert read.eos_index.tolist() == [room + 1, 2]
    assert (read.input_ids[:, 0] == text.bos_token_id).all()


def test_what_has_no_room_is_reported(reader: PromptReader, text: TextSpec) -> None:
    room = 3 * (text.max_tokens - 2)
    read = reader.read("dog " * room + "cat and <x>", [concept()])
    assert read.report.num_chunks == 3
    assert read.report.num_tokens == room
    assert read.report.cut == "cat and <x>"
    assert "<x>" not in [token for *_, token in read.slots]


@pytest.mark.parametrize(
    ("beginning", "end"),
    [
        ("", "a red  cat, on [grass] (<x>:1.3) "),
        ("(", "red cat:1.2) on grass"),
        ("\\(dog\\) (un)(cut) ", "\\(red\\) cat"),
        ("Cafe\u0301 \u2603 <x> [fast]", "cat"),
    ],
)
def test_what_is_cut_is_reported_as_it_was_written(
    reader: PromptReader, text: TextSpec, beginning: str, end: str
) -> None:
    taken = reader.read(beginning, [concept()]).report.num_tokens
    filling = "dog " * (3 * (text.max_tokens - 2) - taken)
    assert reader.read(f"{beginning} {filling}{end}", [concept()]).report.cut == end


def test_blanks_trimmed_by_a_tokenizer_are_cut_as_well(text: TextSpec) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    table = np.zeros((text.vocab_size, DIM), np.float32)
    reader = PromptReader(tokenizer, table, text, max_chunks=1)
    assert reader.read("a" * (text.max_tokens - 2) + " ").report.cut == " "


def test_padding_appends_the_empty_prompt(reader: PromptReader) -> None:
    padded = reader.pad(reader.read("a dog"), 2)
    empty = reader.read("")
    np.testing.assert_array_equal(padded.inputs_embeds[1], empty.inputs_embeds[0])
    assert padded.eos_index.tolist()[1] == 1


def test_the_vocabulary_is_untouched_by_reading(reader: PromptReader) -> None:
    before = reader._token_embedding.tobytes()
    reader.read("<x> <x>", [concept()])
    assert reader._token_embedding.tobytes() == before


def test_a_prompt_of_a_megabyte_is_refused(reader: PromptReader) -> None:
    with pytest.raises(PromptTooLong, match="1000000 characters, the limit is 20000; shorten"):
        reader.read("a" * 1_000_000)


def test_two_concepts_of_one_name_are_refused(reader: PromptReader) -> None:
    with pytest.raises(InvalidRequest, match="two different concepts"):
        reader.read("<x>", [concept(value=9.0), concept(value=8.0)])


def test_repeats_and_several_concepts_fill_their_own_slots(reader: PromptReader) -> None:
    read = reader.read("<x> and <y> and <x>", [concept("<x>", 1, 9.0), concept("<y>", 2, 5.5)])
    assert [token for *_, token in read.slots] == ["<x>", "<y>", "<x>"]
    assert len(slots_of(read, 9.0)) == 2
    assert len(slots_of(read, 5.5)) == 1
