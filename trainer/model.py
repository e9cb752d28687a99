"""Reading a latent diffusion model, a diffusers folder or a hub id, in parts."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from engine.errors import OneWordError
from engine.families import NUM_TIME_IDS
from trainer.encoder_modules import TextEncoder
from trainer.families import SUPPORTED, EncoderSpec, Family, family_of
from trainer.messages import first_line

PREDICTION_TYPES = ("epsilon", "v_prediction")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# UNet options that make it want an input which no supported family has.
_UNET_EXTRA_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)


class ModelError(OneWordError):
    """The model is missing, unreadable, or of a family that is not supported; says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """One text encoder with its tokenizer, frozen and in eval mode."""

    spec: EncoderSpec
    tokenizer: PreTrainedTokenizerFast
    text_encoder: Any  # of one of `spec.classes`
    token_embedding: Float32[Tensor, "vocab_size dim"]

    @property
    def name(self) -> str:
        """Of its graph in a bundle: "text_encoder", of a second one "text_encoder_2"."""
        return self.spec.name

    def module(self) -> TextEncoder:
        """The text encoder as a function of embeddings."""
        return self.spec.module(self.text_encoder)

    @property
    def bos_token_id(self) -> int:
        """The token before a prompt: BOS, or [CLS]."""
        return getattr(self.tokenizer, self.spec.bos)

    @property
    def eos_token_id(self) -> int:
        """The token after a prompt: EOS, or [SEP]."""
        return getattr(self.tokenizer, self.spec.eos)

    @property
    def max_tokens(self) -> int:
        """Positions of the text encoder, BOS and EOS included."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def dim(self) -> int:
        """Width of its token embeddings, and of what a concept has for it."""
        return self.token_embedding.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionModel:
    """The parts of a latent diffusion model, frozen and in eval mode."""

    name: str  # last part of the folder or the hub id
    family: Family
    encoders: tuple[Encoder, ...]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]  # as the family's pipeline would use it
    zero_empty_negative: bool = False  # an empty negative prompt is zeros (SDXL)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of the first text encoder, as the next two."""
        return self.encoders[0].tokenizer

    @property
    def text_encoder(self) -> Any:
        return self.encoders[0].text_encoder

    @property
    def token_embedding(self) -> Float32[Tensor, "vocab_size dim"]:
        return self.encoders[0].token_embedding

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths of the token embeddings: what each part of a learned vector must have."""
        return tuple(encoder.dim for encoder in self.encoders)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks, by what they are, whatever a family calls their folders."""
        encoders = {encoder.name: encoder.text_encoder for encoder in self.encoders}
        return {**encoders, "unet": self.unet, "vae": self.vae}

    @property
    def max_tokens(self) -> int:
        """Positions of each text encoder, BOS and EOS included."""
        return self.encoders[0].max_tokens

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, each way."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """Denoiser latents = (VAE latents - shift_factor) * scaling_factor."""
        return float(self.vae.config["scaling_factor"])

    @property
    def shift_factor(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0.0)


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    unet_dtype: torch.dtype = torch.float32,
    on_read: Callable[[str, nn.Module, Callable[[], nn.Module]], None] | None = None,
) -> DiffusionModel:
    """Load a diffusers folder or hub id without safety checker; safetensors only.

    Weights are read from the plain files, or from the `fp16` variant where those are missing.
    Only the denoiser can be in another precision than float32: text encoders and autoencoder cost
    little, half precision hurts the vectors' gradient and overflows some autoencoders (SDXL's).
    `on_read` is told of each network, by its name in `DiffusionModel.modules`, before the next one
    is read, and is given a function that reads it again.
    Denoiser and autoencoder have channels last, which convolutions are faster with.
    Raises `ModelError` for a model that is missing, broken or not supported.
    """
    source = _source(model)
    if revision is not None and Path(source).is_dir():
        raise ModelError(f"a revision is for hub models, {source} is a folder; leave it out")
    index = _load_config(DiffusionPipeline, source, revision)
    family = _check_index(source, index)
    _check_unet(source, revision, family)
    scheduler_config = read_scheduler_config(
        source, revision, _class_name(index, "scheduler"), corrected=family.corrects_scheduler
    )

    def part(loader: Callable[..., _T], name: str, **options: Any) -> _T:
        return _load_part(loader, source, name, revision=revision, **options)

    def told(name: str, network: _Module, read: Callable[[], nn.Module]) -> _Module:
        if on_read is not None:
            on_read(name, network, read)
        return network

    def encoder(spec: EncoderSpec) -> Encoder:
        loader = spec.classes[str(_class_name(index, spec.folder))].from_pretrained

        def read() -> Any:
            return part(loader, spec.folder, dtype=torch.float32).requires_grad_(False).eval()

        text_encoder = read()
        table = text_encoder.get_input_embeddings().weight.detach().clone()
        return Encoder(
            spec=spec,
            tokenizer=_load_tokenizer(source, revision, spec),
            token_embedding=table,
            text_encoder=told(spec.name, text_encoder, read),
        )

    def unet() -> UNet2DConditionModel:
        loader = UNet2DConditionModel.from_pretrained
        return _channels_last(part(loader, "unet", torch_dtype=unet_dtype))

    def vae() -> AutoencoderKL:
        loader = AutoencoderKL.from_pretrained
        return _channels_last(part(loader, family.vae, torch_dtype=torch.float32))

    loaded = DiffusionModel(
        name=Path(source).name,
        family=family,
        encoders=tuple(encoder(spec) for spec in family.encoders),
        unet=told("unet", unet(), unet),
        vae=told("vae", vae(), vae),
        scheduler_config=scheduler_config,
        zero_empty_negative=family.zero_empty_negative
        and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    _check_fit(loaded)
    return loaded


_T = TypeVar("_T")
_Module = TypeVar("_Module", bound=nn.Module)


def _channels_last(module: _Module) -> _Module:
    """The module frozen, in eval mode and with the weights of its convolutions channels last."""
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module.requires_grad_(False).eval()


def _source(model: str | Path) -> str:
    """The folder (resolved, so that `.` has a name) or hub id; anything else is an error."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{folder} is not a diffusers model: it has no model_index.json; "
                "save one with `pipeline.save_pretrained(folder)`"
            )
        return str(folder.resolve())
    if folder.is_file():
        raise ModelError(
            f"{folder} is a file; convert it to a diffusers folder with "
            "`StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)`"
        )
    if not _HUB_ID.fullmatch(str(model)):
        raise ModelError(f"no such folder: {folder} (and it cannot be a hub id, OWNER/NAME)")
    return str(model)


def _load_config(
    loader: Any, source: str, revision: str | None, **options: Any
) -> Mapping[str, Any]:
    what = " ".join([options.get("subfolder", ""), "config of", repr(source)]).strip()
    try:
        config = loader.load_config(source, revision=revision, **options)
    except (OSError, ValueError) as error:
        where = "" if Path(source).is_dir() else " (no such folder here, so taken for a hub id)"
        raise ModelError(f"cannot read the {what}{where}: {_reason(error)}") from error
    if not isinstance(config, Mapping):
        raise ModelError(f"cannot read the {what}: it is a JSON {type(config).__name__}, no object")
    return config


def _reason(error: Exception) -> str:
    """The first line of an error, or that there is no way to the hub: diffusers may hide it."""
    causes = list(_causes(error))
    lost = (ConnectionError, TimeoutError, LocalEntryNotFoundError)
    answered = any(isinstance(cause, HfHubHTTPError) for cause in causes)
    if answered or not any(isinstance(cause, lost) for cause in causes):
        return first_line(error)
    return (
        "the Hugging Face hub could not be reached and the model is not in its cache; "
        "connect, or give the folder of a downloaded model"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _class_name(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a part in model_index.json, which lists (library, class)."""
    part = index.get(name)
    return part[1] if isinstance(part, list | tuple) and len(part) == 2 else None


def _check_index(source: str, index: Mapping[str, Any]) -> Family:
    """The family of a model, if every part is of a class that the family knows."""
    found = {name: kind for name in index if (kind := _class_name(index, name))}
    family = family_of(found)
    if faults := family.faults(found):
        raise ModelError(
            f"{source} is a {index.get('_class_name', 'model of unknown class')} "
            f"({', '.join(faults)}); {SUPPORTED}"
        )
    return family


def _check_unet(source: str, revision: str | None, family: Family) -> None:
    """Refuse UNets that want another input than their family's, before reading any weights."""
    unet = _load_config(UNet2DConditionModel, source, revision, subfolder="unet")
    extra = [f"{name}={unet[name]!r}" for name in _UNET_EXTRA_INPUTS if unet.get(name) is not None]
    if unet.get("addition_embed_type") != family.addition_embed_type:
        extra.append(f"addition_embed_type={unet.get('addition_embed_type')!r}")
    if extra:
        raise ModelError(f"{source}: the UNet has {', '.join(extra)}; {SUPPORTED}")
    channels = (unet.get("in_channels"), unet.get("out_channels"))
    vae = _load_config(AutoencoderKL, source, revision, subfolder=family.vae)
    if channels != (vae.get("latent_channels"),) * 2:
        raise ModelError(
            f"{source}: the UNet takes {channels[0]} channels and gives {channels[1]}, the VAE's "
            f"latents have {vae.get('latent_channels')} (inpainting and depth models take more); "
            f"{SUPPORTED}"
        )


def read_scheduler_config(
    source: str, revision: str | None, class_name: str | None, *, corrected: bool
) -> dict[str, Any]:
    """`pipe.scheduler.config` of the family's pipeline: complete, and corrected if that does so.

    A key that the file lacks has the default of the model's own scheduler class; the corrections
    are for those as well.
    """
    written = _load_config(DDIMScheduler, source, revision, subfolder="scheduler")
    class_name = class_name or str(written.get("_class_name"))
    scheduler_class: Any = getattr(diffusers, class_name, None)
    if SchedulerMixin not in getattr(scheduler_class, "__mro__", ()):
        raise ModelError(f"{source}: diffusers has no scheduler {class_name!r}")
    try:
        config = dict(scheduler_class.from_config(dict(written)).config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{source}: cannot make its {class_name}: {first_line(error)}") from error
    corrections = {"steps_offset": 1, "clip_sample": False} if corrected else {}
    config |= {key: value for key, value in corrections.items() if key in config}
    # Other schedulers' from_config passes over the keys listed here: a correction must count.
    if defaults := set(config.pop("_use_default_values", ())) - corrections.keys():
        config["_use_default_values"] = sorted(defaults)
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ModelError(
            f"{source}: the scheduler has prediction_type {prediction_type!r}; "
            f"supported: {', '.join(PREDICTION_TYPES)}"
        )
    return config


def _load_tokenizer(
    source: str, revision: str | None, spec: EncoderSpec
) -> PreTrainedTokenizerFast:
    options: dict[str, Any] = {"subfolder": spec.tokenizer, "revision": revision}
    try:
        return spec.tokenizer_class.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise ModelError(f"{source}: cannot read the {spec.tokenizer}: {_reason(error)}") from error


def _load_part(loader: Callable[..., _T], source: str, name: str, **options: Any) -> _T:
    """`from_pretrained` of one part: the plain weights, or where there are none the fp16 ones."""
    failures: list[Exception] = []
    for variant in (None, "fp16"):
        try:
            return loader(source, subfolder=name, variant=variant, use_safetensors=True, **options)
        except Exception as error:  # OSError if absent; safetensors and torch have their own
            failures.append(error)
    raise ModelError(
        f"{source}: cannot read the weights of {name}: {_reason(failures[0])} "
        "(only .safetensors files are read; `DiffusionPipeline.from_pretrained(MODEL)"
        ".save_pretrained(FOLDER)` of diffusers writes them)"
    ) from failures[0]


def _check_fit(model: DiffusionModel) -> None:
    """Refuse parts that do not belong together."""
    for encoder in model.encoders:
        rows = len(encoder.token_embedding)
        if len(encoder.tokenizer) != rows:
            raise ModelError(
                f"{model.name}: the {encoder.spec.tokenizer} has {len(encoder.tokenizer)} "
                f"tokens, the embedding of the {encoder.spec.folder} has {rows} rows"
            )
    lengths = [encoder.max_tokens for encoder in model.encoders]
    if len(set(lengths)) > 1:
        raise ModelError(
            f"{model.name}: the text encoders have {' and '.join(map(str, lengths))} positions; "
            "the denoiser reads them side by side, so they must have the same number"
        )
    cross_attention_dim = model.unet.config["cross_attention_dim"]
    if cross_attention_dim != sum(model.dims):
        raise ModelError(
            f"{model.name}: the UNet wants prompt embeddings of width {cross_attention_dim}, "
            f"the text encoder gives {' + '.join(map(str, model.dims))}"
        )
    if model.family.has_added_inputs:
        _check_added_inputs(model)
    for name, value in model.family.fixed.items():
        if (found := getattr(model, name)) != value:
            raise ModelError(
                f"{model.name}: {name} is {found}, the diffusers pipeline of {model.family.name} "
                f"models has {value} built in, and a bundle is measured against it; "
                f"use a model that has {value}"
            )


def _check_added_inputs(model: DiffusionModel) -> None:
    """Refuse a UNet that wants other numbers beside the pooled prompt than the six of the size."""
    unet = model.unet.config
    text_config: Any = model.encoders[-1].text_encoder.config
    pooled_dim = int(text_config.projection_dim)
    wanted = pooled_dim + NUM_TIME_IDS * unet["addition_time_embed_dim"]
    if unet["projection_class_embeddings_input_dim"] != wanted:
        raise ModelError(
            f"{model.name}: the UNet wants {unet['projection_class_embeddings_input_dim']} numbers "
            f"of pooled prompt and size, the model gives {wanted} (SDXL's refiner has an aesthetic "
            f"score in them); {SUPPORTED}"
        )
