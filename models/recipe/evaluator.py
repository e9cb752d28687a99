"""The evaluator: a small image-text encoder that says which sentences are true of a picture.

Trained like SigLIP (Zhai et al. 2023, arXiv 2303.15343), each pair of a picture and a sentence a
yes-or-no question of its own; the answers come from what was composed, so a sentence that is true
of somebody else's picture is no false negative, and a logit is the log-odds of a sentence.
It has nothing in common with the model that it judges but the icons.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from models.recipe.compositions import Composer
from models.recipe.courses import Course
from models.recipe.lessons import (
    BATCH_SIZE,
    MAX_TOKENS,
    Tokens,
    augmented,
    new_lesson,
    new_tokenizer,
)
from models.recipe.pictures import to_tensor
from models.recipe.truths import TRUE, UNKNOWN

IMAGE_SIZE = 64  # pixels
EMBED_DIM = 128
EXPOSURES = 1_200  # of each icon in the training, about
_RATE = 2e-3
_IMAGE_WIDTHS = (32, 64, 128, 160)
_TEXT_WIDTH, _TEXT_LAYERS, _TEXT_HEADS = 128, 2, 4
_STATISTICS_BATCHES = 48
_CHOICE_WEIGHT = 2.0
# One pair in twenty is true: where the training starts from.
_LOGIT_SCALE, _LOGIT_BIAS = 10.0, -3.0


class ImageEncoder(nn.Module):
    """Residual convolutions; the mean and the maximum over the last grid become the embedding."""

    def __init__(self) -> None:
        super().__init__()
        first, *others = _IMAGE_WIDTHS
        layers: list[nn.Module] = [_convolution(3, first, 2), nn.ReLU(), _Residual(first, first, 1)]
        width = first
        for wider in others:
            layers += [_Residual(width, wider, 2), _Residual(wider, wider, 1)]
            width = wider
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(2 * width, EMBED_DIM)

    def forward(
        self, pixels: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images embed_dim"]:
        """Unit vectors of pictures in -1 to 1."""
        grid = self.layers(pixels)
        pooled = torch.cat([grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))], dim=1)
        return F.normalize(self.project(pooled).float(), dim=-1)


class _Residual(nn.Module):
    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(width, wider, stride)
        self.second = _convolution(wider, wider, 1)
        for layer in self.second:
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.zeros_(layer.weight)  # a block begins as its shortcut
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width, wider, 1, bias=False))
        )

    def forward(self, grid: Tensor) -> Tensor:
        return F.relu(self.shortcut(grid) + self.second(F.relu(self.first(grid))))


def _convolution(width: int, wider: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, wider, 3, stride, padding=1, bias=False), nn.BatchNorm2d(wider)
    )


class TextEncoder(nn.Module):
    """A small transformer; the mean over the tokens becomes the embedding."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, _TEXT_WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(MAX_TOKENS, _TEXT_WIDTH))
        nn.init.normal_(self.words.weight, std=0.05)
        self.blocks = nn.ModuleList([_Block() for _ in range(_TEXT_LAYERS)])
        self.norm = nn.LayerNorm(_TEXT_WIDTH)
        self.project = nn.Linear(_TEXT_WIDTH, EMBED_DIM)

    def forward(
        self,
        input_ids: Int64[Tensor, "sentences tokens"],
        attention_mask: Int64[Tensor, "sentences tokens"],
    ) -> Float[Tensor, "sentences embed_dim"]:
        """Unit vectors of sentences; the mask is 1 for tokens, 0 for padding."""
        mask = attention_mask[..., None].float()
        hidden = self.words(input_ids) + self.places[: input_ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, mask)
        pooled = (self.norm(hidden) * mask).sum(dim=1) / mask.sum(dim=1)
        return F.normalize(self.project(pooled).float(), dim=-1)


class _Block(nn.Module):
    """A transformer block, norm first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(_TEXT_WIDTH)
        self.query_key_value = nn.Linear(_TEXT_WIDTH, 3 * _TEXT_WIDTH)
        self.out = nn.Linear(_TEXT_WIDTH, _TEXT_WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(_TEXT_WIDTH),
            nn.Linear(_TEXT_WIDTH, 4 * _TEXT_WIDTH),
            nn.GELU(),
            nn.Linear(4 * _TEXT_WIDTH, _TEXT_WIDTH),
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self._attention(self.attention_norm(hidden), mask)
        return hidden + self.mlp(hidden)

    def _attention(self, hidden: Tensor, mask: Tensor) -> Tensor:
        heads = self.query_key_value(hidden).unflatten(-1, (3, _TEXT_HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = scores + (mask[:, None, None, :, 0] - 1) * 1e4  # padding is not looked at
        mixed = scores.softmax(dim=-1).to(value.dtype) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class EvaluatorNetwork(nn.Module):
    """Both encoders and what makes log-odds of their cosines."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder()
        self.image_encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.text_encoder = TextEncoder(vocabulary_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_LOGIT_SCALE)))
        self.bias = nn.Parameter(torch.tensor(_LOGIT_BIAS))

    def forward(
        self,
        pixels: Float[Tensor, "images 3 height width"],
        groups: Sequence[Tokens],
    ) -> Float[Tensor, "images sentences"]:
        """The log-odds that a sentence of any group is true of a picture."""
        sentences = torch.cat([self.text_encoder(t.input_ids, t.attention_mask) for t in groups])
        return self.log_scale.exp() * self.image_encoder(pixels) @ sentences.T + self.bias


def train_evaluator(
    composer: Composer,
    path: Path,
    device: torch.device,
    deadline: float | None = None,
    exposures: int = EXPOSURES,
) -> tuple[Course, Tokenizer]:
    """Trains, or goes on training, the evaluator whose checkpoint is `path`."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(composer, path.with_name("tokenizer.json"))
    course = Course(
        path=path,
        module=EvaluatorNetwork(tokenizer.get_vocab_size()),
        total_images=exposures * len(composer.nouns) * len(composer.styles),
        batch_size=BATCH_SIZE,
        rate=_RATE,
        device=device,
        deadline=deadline,
    )
    torch.manual_seed(course.images)
    for images in course.steps():
        lesson = new_lesson(composer, tokenizer, images, device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = course.module(lesson.pixels, lesson.sentences).float()
        yes_or_no = sigmoid_loss(logits, lesson.truths)
        choice = choice_loss(logits, lesson.truths, lesson.choices)
        course.apply(yes_or_no + _CHOICE_WEIGHT * choice, yes_or_no=yes_or_no, choice=choice)
    if course.done:
        _settle_statistics(course, composer, device)
    return course, tokenizer


def sigmoid_loss(
    logits: Float[Tensor, "images sentences"], truths: Float[Tensor, "images sentences"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the pairs that are known, the sum of a picture (SigLIP, section 3.2)."""
    known = truths != UNKNOWN
    losses = F.binary_cross_entropy_with_logits(logits, truths.clamp(min=0), reduction="none")
    return (losses * known).sum() / len(logits)


def choice_loss(
    logits: Float[Tensor, "images sentences"],
    truths: Float[Tensor, "images sentences"],
    choices: Sequence[slice],
) -> Float[Tensor, ""]:
    """Cross-entropy of the choice among sentences of one kind, of which one or two are true.

    Most pairs are false: yes-or-no questions alone take long to turn from that to the objects.
    """
    total = logits.new_zeros(())
    for columns in choices:
        true = (truths[:, columns] == TRUE).float()
        wanted = true / true.sum(dim=1, keepdim=True)
        total = total - (wanted * logits[:, columns].log_softmax(dim=1)).sum(dim=1).mean()
    return total


def _tokenizer(composer: Composer, path: Path) -> Tokenizer:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        new_tokenizer(composer).save(str(path))
    return Tokenizer.from_file(str(path))


@torch.no_grad()
def _settle_statistics(course: Course, composer: Composer, device: torch.device) -> None:
    """Batch norm's means and variances for the averaged weights, which no training step saw."""
    assert isinstance(course.average, EvaluatorNetwork)
    encoder = course.average.image_encoder
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
    encoder.train()
    for place in range(_STATISTICS_BATCHES):
        rng = np.random.default_rng((4, place))
        drawn = [composer.compose(place * BATCH_SIZE + i).pixels for i in range(BATCH_SIZE)]
        encoder(augmented(to_tensor(np.stack(drawn), device), rng))
    encoder.eval()
