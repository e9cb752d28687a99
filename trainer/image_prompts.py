"""Which sentences an image is learned with: its own captions, or the templates all images share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePrompts:
    """The sentences of a run, each once, and which of them each image may have."""

    texts: tuple[str, ...]  # templates with `{}`: the shared ones, then each image's captions
    choices: tuple[range, ...]  # for each image: places in `texts`

    @classmethod
    def of(
        cls, templates: Sequence[str], captions: Sequence[Sequence[str]], num_images: int
    ) -> Self:
        """`captions` for each image, or none at all; an image without any has the `templates`."""
        texts, shared = list(templates), range(len(templates))
        choices: list[range] = []
        for own in captions or [()] * num_images:
            choices.append(range(len(texts), len(texts) + len(own)) if own else shared)
            texts += own
        return cls(texts=tuple(texts), choices=tuple(choices))


def draw_prompts(
    choices: Sequence[range], images: Int64[Tensor, " batch"], generator: torch.Generator
) -> Int64[Tensor, " batch"]:
    """A sentence for each sample, all that its image may have equally likely."""
    return torch.tensor([_any_of(choices[image], generator) for image in images.tolist()])


def _any_of(places: range, generator: torch.Generator) -> int:
    return places[int(torch.randint(len(places), (), generator=generator))]
