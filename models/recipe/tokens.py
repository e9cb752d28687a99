"""The tokenizer: byte-level BPE in CLIP's format, learned from the captions."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from models.recipe.compositions import Composer
from models.recipe.objects import COLOURS
from models.recipe.settings import Setting

_START, _END = "<|startoftext|>", "<|endoftext|>"
_CORPUS_CAPTIONS = 20_000


def new_tokenizer(setting: Setting, composer: Composer, nouns: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer whose entries are the words of captions, of the nouns, and every byte."""
    corpus = [composer.compose(index).caption for index in range(_CORPUS_CAPTIONS)]
    corpus += [*sorted(nouns), *COLOURS] * 20
    alphabet = sorted(ByteLevel.alphabet())
    merges = _learned_merges(corpus, setting.vocabulary_size - 2 * len(alphabet) - 2)
    entries = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        *("".join(merge) for merge in merges),
        _START,
        _END,
    ]
    # Two merges can make the same entry; ids have no gaps.
    vocabulary = {entry: place for place, entry in enumerate(dict.fromkeys(entries))}
    make: Any = CLIPTokenizer  # its annotation of merges refuses the pairs that it needs
    return make(
        vocab=vocabulary,
        merges=merges,
        bos_token=_START,
        eos_token=_END,
        unk_token=_END,
        pad_token=_END,
        model_max_length=setting.max_tokens,
    )


def _learned_merges(corpus: list[str], count: int) -> list[tuple[str, str]]:
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=count + 2 * len(alphabet),
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges[:count]]
