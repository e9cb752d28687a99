"""The bundle: a folder with everything that the runtime needs of a model, verified when opened.

Written by `build_engines.py` (trainer/export.py); its layout is docs/bundle.md.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tokenizers.models import BPE

from engine.errors import BundleError
from engine.files import sha256_of_file
from engine.prepared_graphs import PreparedGraphs
from engine.samplers import SamplerTable, read_sampler_tables
from engine.sessions import CPU_PROVIDER, OnnxSession

FORMAT_VERSION = 3
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_2 = "tokenizer_2.json"
TOKEN_EMBEDDING = "token_embedding.safetensors"
TOKEN_EMBEDDING_2 = "token_embedding_2.safetensors"
SAMPLERS = "samplers.safetensors"
LATENT_RGB = "latent_rgb.safetensors"
CONCEPTS_FOLDER = "concepts"  # of words that were packed with the model (engine/packed.py)
COMPONENTS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
TEXT_ENCODER_2 = "text_encoder_2"  # a component of models with two text encoders


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """What the prompt reader must know of the text encoder."""

    max_tokens: int  # positions of the encoder, BOS and EOS included (77 in CLIP)
    dim: int  # width of the token embeddings: what a concept's vectors must have
    output_dim: int  # width of prompt_embeds
    vocab_size: int
    bos_token_id: int  # before a prompt; BERT calls it [CLS]
    eos_token_id: int  # after a prompt; BERT calls it [SEP]
    pad_token_id: int
    # SHA-256 of the model's token-embedding table, float32, row-major: on which vectors words are
    # learned. A table that was packed in float16 keeps that of the one it was rounded from.
    embedding_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """What the pipeline must know of the autoencoder and the denoiser."""

    channels: int
    scale_factor: int  # pixels per latent, each way
    size_multiple: int  # width and height in pixels must be multiples of this
    default_size: int  # pixels; what the model was trained at
    scaling_factor: float  # denoiser latents = (vae latents - shift_factor) * scaling_factor
    shift_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph. A string in `shape` names a dynamic axis."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSpec:
    """One graph of the bundle."""

    file: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    # Inside the graph; None in bundles of versions that did not write it. Differs from the
    # manifest's where the parity gate found that the component does not bear that one.
    precision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`bundle.json`, field for field."""

    format_version: int
    family: str  # "stable-diffusion", "...-xl" or "latent-diffusion"; nothing depends on it
    model_name: str  # last part of the folder or the hub id
    precision: str  # "fp32", "fp16" or "int8": what was asked for; each component has its own
    prediction_type: str  # "epsilon" or "v_prediction"
    scheduler_config: dict[str, Any]
    text: TextSpec
    latents: LatentSpec
    components: dict[str, ComponentSpec]
    files: dict[str, str]  # every other file of the bundle -> SHA-256
    build_key: str  # SHA-256 of all that went into the build
    versions: dict[str, str] = field(default_factory=dict)
    text_2: TextSpec | None = None  # of a second text encoder
    zero_empty_negative: bool = False  # an empty negative prompt is zeros and is not encoded

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, "sha256": _digest(fields)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> "Manifest":
        """Parse a manifest; errors name `source` and what is wrong with it."""
        try:
            fields = json.loads(text)
            version = fields.get("format_version")
            if version != FORMAT_VERSION:
                raise BundleError(
                    f"{source} has format_version {version}, this version reads {FORMAT_VERSION}; "
                    "build the bundle again with build_engines.py"
                )
            if fields.pop("sha256", None) != _digest(fields):
                raise BundleError(f"{source} was changed or damaged; build the bundle again")
            fields["text"] = _strict(TextSpec, fields["text"])
            if fields["text_2"] is not None:
                fields["text_2"] = _strict(TextSpec, fields["text_2"])
            fields["latents"] = _strict(LatentSpec, fields["latents"])
            fields["components"] = {
                name: _component(spec) for name, spec in fields["components"].items()
            }
            return _strict(cls, fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{source} is not a bundle manifest: {error}") from error


def _digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest in canonical form: the manifest lists the files, this covers it."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


_T = TypeVar("_T")


def _strict(kind: type[_T], fields: Mapping[str, Any]) -> _T:
    return kind(**fields)


def _component(fields: Mapping[str, Any]) -> ComponentSpec:
    tensors = {
        side: [_strict(TensorSpec, spec) for spec in fields[side]] for side in ("inputs", "outputs")
    }
    return _strict(ComponentSpec, {**fields, **tensors})


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """How prompts become the input of one text encoder."""

    component: str  # the text encoder's graph
    text: TextSpec
    tokenizer: Tokenizer
    token_embedding: Float[np.ndarray, "vocab_size dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified bundle: manifest and small tables in memory, graphs to be loaded on demand."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer
    token_embedding: Float[np.ndarray, "vocab_size dim"]  # float32, or float16 where it was packed
    sampler_tables: dict[str, SamplerTable]
    latent_rgb: Float32[np.ndarray, "channels_plus_1 3"]  # last row: the bias; RGB in [-1, 1]
    tokenizer_2: Tokenizer | None = None  # these two with a second text encoder
    token_embedding_2: Float[np.ndarray, "vocab_size_2 dim_2"] | None = None

    @property
    def vocabularies(self) -> tuple[Vocabulary, ...]:
        """One for each text encoder, in the order in which the denoiser takes their outputs."""
        first = Vocabulary(
            component="text_encoder",
            text=self.manifest.text,
            tokenizer=self.tokenizer,
            token_embedding=self.token_embedding,
        )
        if self.manifest.text_2 is None:
            return (first,)
        assert self.tokenizer_2 is not None and self.token_embedding_2 is not None
        second = Vocabulary(
            component=TEXT_ENCODER_2,
            text=self.manifest.text_2,
            tokenizer=self.tokenizer_2,
            token_embedding=self.token_embedding_2,
        )
        return (first, second)

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read and verify a bundle: every file against its hash, every shape against the manifest.

        Raises `BundleError` that names the file, what was found and what was expected.
        """
        manifest = read_manifest(path)
        _verify_hashes(path, manifest)
        two = manifest.text_2 is not None
        bundle = cls(
            path=path,
            manifest=manifest,
            tokenizer=_read_tokenizer(path / TOKENIZER),
            token_embedding=read_token_embedding(path / TOKEN_EMBEDDING),
            tokenizer_2=_read_tokenizer(path / TOKENIZER_2) if two else None,
            token_embedding_2=read_token_embedding(path / TOKEN_EMBEDDING_2) if two else None,
            sampler_tables=read_sampler_tables(path / SAMPLERS),
            latent_rgb=_read_tensor(path / LATENT_RGB, "latent_rgb"),
        )
        bundle._verify_shapes()
        return bundle

    def sources(self, component: str) -> list[str]:
        """What a graph is: the SHA-256 of its file, then of its weights' where they are apart."""
        file, files = self.manifest.components[component].file, self.manifest.files
        return [files[name] for name in (file, f"{file}.data") if name in files]

    def open_session(
        self,
        component: str,
        *,
        execution_provider: str = CPU_PROVIDER,
        prepared: PreparedGraphs | None = None,
    ) -> OnnxSession:
        """Load one graph, from those that were prepared if it is there, and check its inputs."""
        spec = self.manifest.components[component]
        ready = prepared.find(self.sources(component)) if prepared else None
        session = OnnxSession(
            ready or self.path / spec.file,
            execution_provider=execution_provider,
            is_prepared=ready is not None,
        )
        expected = {tensor.name: tensor.shape for tensor in spec.inputs}
        if session.input_shapes != expected:
            raise BundleError(
                f"{spec.file} takes {session.input_shapes}, the manifest says {expected}"
            )
        return session

    def _verify_shapes(self) -> None:
        self._verify_shape(
            LATENT_RGB, self.latent_rgb.shape, (self.manifest.latents.channels + 1, 3)
        )
        tables, tokenizers = (TOKEN_EMBEDDING, TOKEN_EMBEDDING_2), (TOKENIZER, TOKENIZER_2)
        for one, table, tokenizer in zip(self.vocabularies, tables, tokenizers, strict=False):
            rows = one.text.vocab_size
            self._verify_shape(table, one.token_embedding.shape, (rows, one.text.dim))
            self._verify_shape(tokenizer, (one.tokenizer.get_vocab_size(),), (rows,))
        lengths = {one.text.max_tokens for one in self.vocabularies}
        if len(lengths) > 1:
            raise BundleError(
                f"{self.path}: the text encoders have {sorted(lengths)} positions, they must have "
                "the same; build the bundle again"
            )

    def _verify_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if tuple(found) != wanted:
            raise BundleError(f"{self.path / name} has shape {found}, manifest says {wanted}")


def read_manifest(path: Path) -> Manifest:
    """Read `bundle.json` alone."""
    file = path / MANIFEST
    if path.is_file():
        raise BundleError(
            f"{path} is a file, a bundle is a folder; unpack an archive of `oneword pack` first"
        )
    if not file.is_file():
        raise BundleError(
            f"no bundle at {path}: {MANIFEST} is missing; make one with "
            "`python build_engines.py --model MODEL --output BUNDLE`"
        )
    return Manifest.from_json(file.read_text(encoding="utf-8", errors="replace"), source=str(file))


def _verify_hashes(path: Path, manifest: Manifest) -> None:
    required = {TOKENIZER, TOKEN_EMBEDDING, SAMPLERS, LATENT_RGB}
    required |= {spec.file for spec in manifest.components.values()}
    components: set[str] = {*COMPONENTS}
    if manifest.text_2 is not None:
        required |= {TOKENIZER_2, TOKEN_EMBEDDING_2}
        components.add(TEXT_ENCODER_2)
    if unlisted := (required - manifest.files.keys()) | (components - manifest.components.keys()):
        raise BundleError(f"{path / MANIFEST} does not list {', '.join(sorted(unlisted))}")
    for name, expected in manifest.files.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"{path / MANIFEST} names a file outside the bundle: {name!r}")
        if not file.is_file():
            raise BundleError(f"{file} is missing; build the bundle again")
        if (found := sha256_of_file(file)) != expected:
            raise BundleError(
                f"{file} is corrupted: SHA-256 {found[:12]}..., the manifest says "
                f"{expected[:12]}...; build the bundle again"
            )


def _read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that remembers nothing of what it is given.

    By default it keeps the first 10,000 words that it meets for as long as it lives: 4 MB of common
    words, 80 MB of the longest, whoever sends them. Without them it is no slower: a prompt of 20
    words takes 44 microseconds either way. (`cache_capacity` of the constructor has no public twin
    for a tokenizer that was read from a file.)
    """
    tokenizer = Tokenizer.from_file(str(path))
    if isinstance(tokenizer.model, BPE):
        tokenizer.model._resize_cache(0)
    return tokenizer


def read_token_embedding(path: Path) -> Float[np.ndarray, "vocab_size dim"]:
    """A token-embedding table as it is stored: float32, or float16 where it was packed."""
    table = _read_tensor(path, "token_embedding")
    if str(table.dtype) not in ("float32", "float16"):
        raise BundleError(
            f"{path} holds {table.dtype}, a token-embedding table is float32 or float16; build or "
            "pack the bundle again"
        )
    return table


def _read_tensor(path: Path, name: str) -> Float[np.ndarray, "rows columns"]:
    try:
        with safe_open(str(path), framework="numpy") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
