"""A pipeline of the real classes on sessions that are arithmetic."""

import threading
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from engine.bundle import Bundle, LatentSpec, Manifest, TextSpec
from engine.fingerprint import embedding_fingerprint
from engine.pipeline import Pipeline
from engine.requests import Limits
from engine.samplers import COLUMNS, MAX_INFERENCE_STEPS, SamplerTable
from engine.sessions import Feeds, Session

DIM = 12
CHANNELS = 4
SCALE_FACTOR = 8
WAIT_S = 10.0
_WORDS = ("<bos>", "<eos>", "<unk>", "a", "photo", "of", "cat", "dog", "red", "blurry")


class FakeTextEncoder:
    """The embeddings themselves."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        return {"prompt_embeds": feeds["inputs_embeds"]}


class FakeDenoiser:
    """Depends on latents and prompt, row by row; `error` breaks a call, and a closed `gate` holds
    every call but the first `free_calls`."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.gate = threading.Event()
        self.gate.set()
        self.free_calls = 0
        self.error: Exception | None = None
        self._called = threading.Condition()

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        with self._called:
            self.num_calls += 1
            number = self.num_calls
            self._called.notify_all()
        if number > self.free_calls:
            assert self.gate.wait(WAIT_S)
        if self.error:
            raise self.error
        prompt = feeds["prompt_embeds"].mean(axis=(1, 2))[:, None, None, None]
        return {"noise_pred": (np.tanh(feeds["latents"]) + prompt).astype(np.float32)}

    def wait_for_calls(self, count: int) -> None:
        """Return when `count` calls in all have begun."""
        with self._called:
            assert self._called.wait_for(lambda: self.num_calls >= count, WAIT_S)


class FakeVaeDecoder:
    """The first three channels, enlarged, with fine grain, so that files are as large as photos."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        images = np.tanh(feeds["latents"][:, :3])
        images = images.repeat(SCALE_FACTOR, axis=2).repeat(SCALE_FACTOR, axis=3)
        grain = np.random.default_rng(0).normal(0.0, 0.1, images.shape[1:])
        return {"images": (images + grain).astype(np.float32)}


class FakeVaeEncoder:
    """The mean of each patch of pixels, in all channels."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        batch, _, height, width = feeds["images"].shape
        patches = feeds["images"].reshape(
            batch, 3, height // SCALE_FACTOR, SCALE_FACTOR, width // SCALE_FACTOR, SCALE_FACTOR
        )
        mean = patches.mean(axis=(1, 3, 5))[:, None].repeat(CHANNELS, axis=1)
        return {"mean": mean.astype(np.float32), "std": np.full_like(mean, 0.01, np.float32)}


def make_pipeline(denoiser: FakeDenoiser, *, limits: Limits | None = None) -> Pipeline:
    """A pipeline of the real classes that makes a picture in well under a millisecond a step."""
    token_embedding = np.random.default_rng(1).normal(size=(len(_WORDS), DIM)).astype(np.float32)
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    bundle = Bundle(
        path=Path("fake"),
        manifest=_manifest(token_embedding),
        tokenizer=tokenizer,
        token_embedding=token_embedding,
        sampler_tables={name: _sampler_table(name) for name in ("ddim", "euler")},
        latent_rgb=np.full((CHANNELS + 1, 3), 0.1, np.float32),
    )
    sessions: dict[str, Session] = {
        "text_encoder": FakeTextEncoder(),
        "denoiser": denoiser,
        "vae_decoder": FakeVaeDecoder(),
        "vae_encoder": FakeVaeEncoder(),
    }
    return Pipeline(bundle, sessions, limits=limits or Limits())


def _manifest(token_embedding: np.ndarray) -> Manifest:
    return Manifest(
        format_version=1,
        family="stable-diffusion",
        model_name="fake",
        precision="fp32",
        prediction_type="epsilon",
        scheduler_config={},
        text=TextSpec(
            max_tokens=16,
            dim=DIM,
            output_dim=DIM,
            vocab_size=len(_WORDS),
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            embedding_fingerprint=embedding_fingerprint(token_embedding),
        ),
        latents=LatentSpec(
            channels=CHANNELS,
            scale_factor=SCALE_FACTOR,
            size_multiple=SCALE_FACTOR,
            default_size=64,
            scaling_factor=1.0,
            shift_factor=0.0,
        ),
        components={},
        files={},
        build_key="",
        versions={"onnx": "1.0"},
    )


def _sampler_table(name: str) -> SamplerTable:
    """x' = 0.9 x + 0.1 m at every step; the same for all step counts."""
    row = {"timestep": 1.0, "s": 1.0, "q": 1.0, "a": 0.9, "k0": 1.0, "k1": 0.5, "e": 1.0}
    num_rows = MAX_INFERENCE_STEPS * (MAX_INFERENCE_STEPS + 1) // 2
    values = [row.get(column, 0.0) for column in COLUMNS] + [0.1]
    return SamplerTable(
        name=name,
        order=1,
        rows=np.tile(values, (num_rows, 1)),
        offsets=np.concatenate([[0], np.cumsum(np.arange(1, MAX_INFERENCE_STEPS + 1))]),
        init_sigma=np.ones(MAX_INFERENCE_STEPS),
        cold_rows=np.zeros((0, len(values))),
        cold_index=np.zeros((0, 3), np.int64),
    )
