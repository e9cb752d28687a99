"""Prompts to judge a word with: what is drawn, and the two texts that a picture is held to.

A template has `{}` where the word goes. The paper's text similarity leaves the word out
("A photo of  on the moon"), so it does not notice a picture that has forgotten the subject; with a
class word put in ("a fox on the moon") it does, if the class is known.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import quoted
from trainer.evaluation_errors import PromptSetError

Kind = Literal["likeness", "background", "style", "composition", "other"]
KINDS: tuple[Kind, ...] = ("likeness", "background", "style", "composition", "other")
SLOT = "{}"
MAX_PROMPTS = 1000
MAX_FILE_BYTES = 1 << 20
_HEADING = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One template, and what it asks for."""

    template: str
    kind: Kind = "other"
    article: bool = False  # whether a class word needs one here; files have it in the template

    def __post_init__(self) -> None:
        if self.template.count(SLOT) != 1:
            raise PromptSetError(
                f"the prompt {quoted(self.template)} must have {SLOT} once, where the word goes; "
                "such as: a photo of {} on the moon"
            )
        if self.kind not in KINDS:
            raise PromptSetError(f"unknown kind {quoted(self.kind)}; known: {', '.join(KINDS)}")

    def with_word(self, word: str) -> str:
        """The prompt as it is drawn; "" leaves the word out, and its gap."""
        return " ".join(self.template.replace(SLOT, word).split())

    def with_class(self, class_word: str) -> str:
        """The prompt with a noun in place of the word."""
        return self.with_word(with_article(class_word) if self.article else class_word)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts from one source, in order; at least one of them says more than the word."""

    source: str  # where they come from, as the report says it
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise PromptSetError(
                f"{self.source} has {len(self.prompts)} prompts; allowed are 1 to {MAX_PROMPTS}"
            )
        bare = [self.prompts[i].template for i in self.text_places if not self.texts[i]]
        if bare:
            raise PromptSetError(
                f"{self.source}: {quoted(bare[0])} says nothing without its word, so that no text "
                "similarity can be measured; add words, or put it under [likeness] beside others"
            )

    @property
    def likeness_places(self) -> tuple[int, ...]:
        """Which prompts ask for the word alone; all of them where none is marked so."""
        marked = tuple(i for i, prompt in enumerate(self.prompts) if prompt.kind == "likeness")
        return marked or tuple(range(len(self.prompts)))

    @property
    def text_places(self) -> tuple[int, ...]:
        """Which prompts ask for more than the word; all of them where none does."""
        others = tuple(i for i, prompt in enumerate(self.prompts) if prompt.kind != "likeness")
        return others or tuple(range(len(self.prompts)))

    @property
    def texts(self) -> tuple[str, ...]:
        """Each prompt without its word."""
        return tuple(prompt.with_word("") for prompt in self.prompts)


# The paper has a plain prompt and the kinds background, style and composition (section 5); the
# wording is ours, with things that the embedded model and its evaluator know among them.
_DEFAULT_TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "likeness": ("a photo of {}",),
    "background": (
        "{} on the beach",
        "{} in the snow",
        "{} in the forest",
        "{} on a blue background",
    ),
    "style": (
        "a watercolour of {}",
        "a charcoal sketch of {}",
        "{} in glossy style",
        "{} in flat style",
    ),
    "composition": (
        "{} next to an apple",
        "a cat and {}",
        "{} above a house",
        "{} and a car",
    ),
}
DEFAULT_PROMPTS = PromptSet(
    source="the default set",
    prompts=tuple(
        Prompt(template=template, kind=kind, article=True)
        for kind, templates in _DEFAULT_TEMPLATES.items()
        for template in templates
    ),
)


def read_prompts(path: Path) -> PromptSet:
    """A file of templates, one a line; `[likeness]`, `[style]` and so on begin a kind.

    Blank lines and lines that begin with # are left out; CustomConcept101's prompt files are such
    files. Raises `PromptSetError`, which names file and line.
    """
    prompts: list[Prompt] = []
    kind: Kind = "other"
    for number, line in enumerate(read_lines(path), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            if heading := _HEADING.fullmatch(text):
                kind = _kind(heading[1].strip())
                continue
            prompts.append(Prompt(template=text, kind=kind))
        except PromptSetError as error:
            raise PromptSetError(f"{path}, line {number}: {error}") from error
    return PromptSet(source=str(path), prompts=unique(prompts))


def _kind(name: str) -> Kind:
    for kind in KINDS:
        if kind == name:
            return kind
    raise PromptSetError(f"unknown kind {quoted(name)}; known: {', '.join(KINDS)}")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8; at most `MAX_FILE_BYTES`. Raises `PromptSetError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PromptSetError(f"cannot read the prompts {path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise PromptSetError(f"{path} has more than {MAX_FILE_BYTES} bytes; is it a prompt file?")
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise PromptSetError(f"{path} is not UTF-8 text ({error.reason}); save it so") from error


def unique(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """The prompts, each once: a repeated one would count twice, with the same pictures."""
    return tuple(dict.fromkeys(prompts))


def with_article(noun: str) -> str:
    """ "a fox", "an owl"."""
    return f"{'an' if noun[:1].lower() in ('a', 'e', 'i', 'o') else 'a'} {noun}"
