"""What an image tower says of one concept's images: which words fit them, and which vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from trainer.image_tower import ImageTower, Units, lent
from trainer.images import TrainingImages
from trainer.initializer_search import Similarities
from trainer.material import prompts_of
from trainer.model import DiffusionModel
from trainer.options import LearnOptions
from trainer.splicing import TemplatePrompts
from trainer.templates import LearnableProperty

_SENTENCES = {"object": "a photo of a {}", "style": "a painting in the style of {}"}
_AT_ONCE = 64  # prompts with a gradient

Part = Float32[Tensor, "num_vectors dim"]  # of the vectors, what is for one text encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageGuide:
    """A tower, a concept's images as it sees them, and the prompts that they are learned with."""

    tower: ImageTower
    images: Units
    prompts: TemplatePrompts  # as the tower's text half reads them
    shares: Float32[Tensor, "prompts images"]  # of each pair in the mean; 1 in all

    @classmethod
    def of(
        cls,
        tower: ImageTower,
        model: DiffusionModel,
        images: TrainingImages,
        options: LearnOptions,
    ) -> Self:
        """Of images and the prompts that each is learned with, all of which count alike."""
        count = len(images.pixels)
        prompts = prompts_of(images, options.learnable_property)
        shares = torch.zeros(len(prompts.texts), count)
        for image, own in enumerate(prompts.choices):
            shares[own.start : own.stop, image] = 1 / (len(own) * count)
        laid_out = TemplatePrompts.lay_out(model, prompts.texts, options.num_vectors)
        with lent([tower], model.unet.device):
            seen = tower.image_embeds(images.pixels)
        return cls(
            tower=tower,
            images=seen,
            prompts=laid_out.of_encoders[tower.encoder],
            shares=shares,
        )

    def similarities(
        self, words: Sequence[str], learnable_property: LearnableProperty
    ) -> Float32[Tensor, " words"]:
        """The mean cosine of a sentence with each word to the images."""
        sentence = _SENTENCES[learnable_property]
        return self.tower.text_embeds([sentence.replace("{}", word) for word in words]) @ (
            self.images.mean(dim=0)
        )

    @torch.no_grad()
    def similarity(self, vectors: Part) -> float:
        """The mean cosine of the prompts, with these vectors in them, to the images."""
        texts = torch.cat([self._texts(vectors, which) for which in self._batches()])
        return (self.shares * (texts @ self.images.T)).sum().item()

    def loss_and_gradient(self, vectors: Part) -> tuple[float, Part]:
        """The mean spherical distance of prompts and images, and its gradient in the vectors."""
        loss, gradient = 0.0, torch.zeros_like(vectors)
        for which in self._batches():
            leaf = vectors.detach().clone().requires_grad_(True)
            distances = spherical_distances(self._texts(leaf, which), self.images)
            part = (self.shares[which] * distances).sum()
            loss += part.item()
            gradient += torch.autograd.grad(part, leaf)[0]
        return loss, gradient

    def _batches(self) -> Sequence[Int64[Tensor, " batch"]]:
        return torch.arange(len(self.prompts)).split(_AT_ONCE)

    def _texts(self, vectors: Part, which: Int64[Tensor, " batch"]) -> Units:
        text_half, eos_index = self.tower.text_half(), self.prompts.eos_index[which]
        # Nothing behind EOS counts: each position sees those before it alone.
        embeds = self.prompts.splice(vectors, which)[:, : int(eos_index.max()) + 1]
        _, pooled = text_half(embeds.to(text_half.device), eos_index.to(text_half.device))
        return torch.nn.functional.normalize(pooled.cpu(), dim=1)


def word_similarities(
    guides: Sequence[ImageGuide], learnable_property: LearnableProperty
) -> Similarities | None:
    """What compares words with the images, by the mean over towers; None without any tower."""
    if not guides:
        return None

    def similarities(words: Sequence[str]) -> Float32[Tensor, " words"]:
        found = [guide.similarities(words, learnable_property) for guide in guides]
        return torch.stack(found).mean(dim=0)

    return similarities


def mean_similarity(guides: Sequence[ImageGuide], parts: Sequence[Part]) -> float:
    """Of prompts and images: the mean over towers, with the vectors for each text encoder."""
    found = [guide.similarity(parts[guide.tower.encoder]) for guide in guides]
    return sum(found) / len(found)


def spherical_distances(
    texts: Units, images: Float32[Tensor, "images dim"]
) -> Float32[Tensor, "texts images"]:
    """Half the squared angle between unit vectors, as CLIP guidance and QuickEmbedding have it.

    Those write 2 arcsin(|x - y| / 2)^2. The same by atan2 has a gradient everywhere: rounding can
    take the argument of arcsin above 1.
    """
    apart = texts[:, None] - images
    between = texts[:, None] + images
    return 2 * torch.atan2(apart.norm(dim=-1), between.norm(dim=-1)).square()
