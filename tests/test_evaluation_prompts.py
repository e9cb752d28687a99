"""Sets of prompts: our own, files of people, and the files of two benchmarks."""

from pathlib import Path

import pytest

from trainer.benchmark_modes import MODES, BenchmarkMode, prompts_of_mode
from trainer.evaluation_errors import PromptSetError
from trainer.evaluation_measures import MEASURES
from trainer.evaluation_prompts import DEFAULT_PROMPTS, KINDS, Prompt, PromptSet, read_prompts


def _file(folder: Path, text: str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_word_is_put_in_left_out_and_replaced_by_its_class() -> None:
    prompt = Prompt(template="A photo of {} on the moon")
    assert prompt.with_word("<x>") == "A photo of <x> on the moon"
    assert prompt.with_word("") == "A photo of on the moon"
    assert prompt.with_class("an owl") == "A photo of an owl on the moon"


@pytest.mark.parametrize(("noun", "expected"), [("fox", "a fox"), ("Owl", "an Owl")])
def test_the_default_set_gives_a_class_its_article(noun: str, expected: str) -> None:
    assert DEFAULT_PROMPTS.prompts[0].with_class(noun) == f"a photo of {expected}"


def test_the_default_set_has_the_kinds_of_the_paper() -> None:
    assert {prompt.kind for prompt in DEFAULT_PROMPTS.prompts} == set(KINDS) - {"other"}
    assert DEFAULT_PROMPTS.likeness_places == (0,)
    assert DEFAULT_PROMPTS.text_places == tuple(range(1, len(DEFAULT_PROMPTS.prompts)))
    assert len(set(DEFAULT_PROMPTS.texts)) == len(DEFAULT_PROMPTS.texts)


def test_a_file_has_kinds_comments_and_each_prompt_once(tmp_path: Path) -> None:
    text = "\ufeff# mine\n[likeness]\nan image of {}\n\n[style]\n{} in oil \n{} in oil\n"
    prompts = read_prompts(_file(tmp_path, text))
    assert prompts.prompts == (
        Prompt(template="an image of {}", kind="likeness"),
        Prompt(template="{} in oil", kind="style"),
    )
    assert (prompts.likeness_places, prompts.text_places) == ((0,), (1,))


def test_without_kinds_all_prompts_measure_both(tmp_path: Path) -> None:
    """As CustomConcept101's files are written: one template a line."""
    prompts = read_prompts(_file(tmp_path, "photo of a {}.\n{} at the sea\n"))
    assert prompts.likeness_places == prompts.text_places == (0, 1)
    assert prompts.texts == ("photo of a .", "at the sea")
    assert prompts.prompts[1].with_class("toy") == "toy at the sea"  # as the benchmark puts it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a fox\n", "line 1: the prompt 'a fox' must have {} once"),
        ("# x\n{} and {}\n", "line 2: the prompt '{} and {}' must have {} once"),
        ("[art]\n{} in oil\n", "line 1: unknown kind 'art'; known: likeness"),
        ("", "has 0 prompts; allowed are 1 to 1000"),
        ("".join(f"{{}} {i}\n" for i in range(1001)), "has 1001 prompts"),
        ("{}\n", "says nothing without its word"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PromptSetError) as error:
        read_prompts(_file(tmp_path, text))
    assert message in str(error.value) and "prompts.txt" in str(error.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"{} caf\xe9")
    with pytest.raises(PromptSetError, match="is not UTF-8 text"):
        read_prompts(path)
    path.write_bytes(b"{} x\n" * 300_000)
    with pytest.raises(PromptSetError, match="more than 1048576 bytes"):
        read_prompts(path)
    with pytest.raises(PromptSetError, match="cannot read the prompts .*: No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptSetError, match="cannot read the prompts"):
        read_prompts(tmp_path)


def test_the_likeness_prompt_may_be_the_word_alone() -> None:
    prompts = (Prompt(template="{}", kind="likeness"), Prompt(template="{} in oil"))
    assert PromptSet(source="x", prompts=prompts).text_places == (1,)


DREAMBENCH = """\
Classes

subject_name,class
lamp,lamp

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in a kitchen'.format(unique_token, class_token),
'a green {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a scarf'.format(unique_token, class_token),
]
"""


def test_dreambench_has_two_lists(tmp_path: Path) -> None:
    path = _file(tmp_path, DREAMBENCH)
    things = prompts_of_mode(MODES["dreambench-object"], path)
    assert [prompt.template for prompt in things.prompts] == ["a {} in a kitchen", "a green {}"]
    assert things.prompts[1].with_class("lamp") == "a green lamp"
    live = prompts_of_mode(MODES["dreambench-live"], path)
    assert [prompt.template for prompt in live.prompts] == ["a {} wearing a scarf"]


def test_benchmarks_want_their_own_prompts(tmp_path: Path) -> None:
    assert prompts_of_mode(MODES["paper"], None) is DEFAULT_PROMPTS
    with pytest.raises(PromptSetError, match="name prompts_and_classes.txt of .* with --prompts"):
        prompts_of_mode(MODES["dreambench-object"], None)
    with pytest.raises(PromptSetError, match="customconcept101/prompts"):
        prompts_of_mode(MODES["customconcept101"], None)
    with pytest.raises(PromptSetError, match="has no list 'Object Prompts' of prompts"):
        prompts_of_mode(MODES["dreambench-object"], _file(tmp_path, "{} in oil\n"))


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_modes_measure_what_there_is_and_warn(mode: BenchmarkMode) -> None:
    assert {mode.image_measure, mode.text_measure} <= set(MEASURES)
    assert mode.caveats
