"""CLIP's tokenizer from the files that transformers 4 wrote, without transformers.

The rules are those of Radford et al. 2021 (github.com/openai/CLIP, `simple_tokenizer.py`): text is
lower-cased, cut by a pattern, and merged byte pair by byte pair, with `</w>` at the end of a word.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from engine.errors import OneWordError

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


class TokenizerUnreadable(OneWordError):
    """A folder holds no tokenizer that can be read; says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipTokenizer:
    """A tokenizer that neither pads nor truncates, and the ids that frame a prompt."""

    tokenizer: Tokenizer
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


def read_clip_tokenizer(folder: Path) -> ClipTokenizer:
    """Read `tokenizer.json`, or `vocab.json` with `merges.txt`; raises `TokenizerUnreadable`."""
    try:
        config = _read_json(folder / "tokenizer_config.json")
        special = {**_read_json(folder / "special_tokens_map.json"), **config}
        tokenizer = _read_tokenizer(folder, special)
    except OSError as error:
        raise TokenizerUnreadable(f"{error.filename} cannot be read: {error.strerror}") from error
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise TokenizerUnreadable(f"{folder} is not a CLIP tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    names = {"bos": _BOS, "eos": _EOS, "pad": _EOS}
    ids: dict[str, int] = {}
    for name, default in names.items():
        token = _text(special.get(f"{name}_token"), default)
        found = tokenizer.token_to_id(token)
        if found is None:
            raise TokenizerUnreadable(f"{folder}: the vocabulary has no {name}_token {token!r}")
        ids[f"{name}_token_id"] = found
    return ClipTokenizer(tokenizer=tokenizer, **ids)


def _read_tokenizer(folder: Path, special: dict[str, Any]) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    unknown = _text(special.get("unk_token"), _EOS)
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            [(first, second) for first, second in merges],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
        )
    )
    parts: Any = tokenizer  # its properties are annotated as read-only
    parts.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    parts.pre_tokenizer = PreTokenizers(
        [
            Split(Regex(_WORDS), behavior="removed", invert=True),
            ByteLevel(add_prefix_space=False),
        ]
    )
    framing = {_text(special.get(f"{name}_token"), _EOS) for name in ("bos", "eos", "unk")}
    known = [token for token in framing if token in vocabulary]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in sorted(known, key=vocabulary.__getitem__)
        ]
    )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _text(token: Any, default: str) -> str:
    """A token as a config has it: plain, or an object with its content."""
    if isinstance(token, dict):
        return str(token.get("content", default))
    return str(token) if token else default
