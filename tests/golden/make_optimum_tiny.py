# type: ignore
# Not for the type checker: written for the versions of another environment.
"""Makes optimum-tiny.zip: a tiny random Stable Diffusion, exported to ONNX by optimum itself.

Run in an environment of its own (README.md beside this file); OneWord is not needed there:

    python make_optimum_tiny.py optimum-tiny.zip
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a photo of a cat", "red", 11, 4, 5.0
MERGES = ["a t</w>", "c at</w>", "o f</w>", "r e", "re d</w>", "p h", "o t", "ph ot", "phot o</w>"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def main(output: Path) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, export = Path(folder) / "tiny", Path(folder) / "optimum-tiny"
        make_pipeline(Path(folder)).save_pretrained(model)
        command = Path(sys.executable).with_name("optimum-cli")
        words = ["export", "onnx", "--model", str(model), "--task", "text-to-image", str(export)]
        subprocess.run([command, *words], check=True)
        pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
        np.savez_compressed(export / "expected.npz", image=draw(pipe), **text(model / "tokenizer"))
        with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
            for path in sorted(export.rglob("*")):
                if path.is_file():
                    packed.write(path, path.relative_to(folder))


def make_pipeline(folder: Path) -> StableDiffusionPipeline:
    tokenizer = make_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2,  # as in Stable Diffusion 1.x: pooled at argmax(input_ids)
        pad_token_id=tokenizer.pad_token_id,
    )
    config.initializer_range = 0.5
    blocks = {"norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        **blocks,
    )
    for name, weight in unet.named_parameters():  # so that a word is heard
        if "attn2.to_v" in name:
            weight.data *= 6
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.3,
        shift_factor=0.1,
        **blocks,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in MERGES] + [BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def draw(pipe: StableDiffusionPipeline) -> np.ndarray:
    """The image that diffusers draws of these weights, [height, width, 3] in [0, 1]."""
    images = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images
    return images[0].astype(np.float32)


def text(folder: Path) -> dict[str, np.ndarray]:
    """What transformers' fast tokenizer makes of some texts, as one array with -1 between them.

    The slow one cuts Chinese characters into words of their own where ftfy is not installed.
    """
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    found: list[int] = []
    for sample in SAMPLES:
        found += [*tokenizer(sample, add_special_tokens=False).input_ids, -1]
    return {"samples": np.array(SAMPLES), "ids": np.array(found)}


SAMPLES = [
    *(PROMPT, "A  CAT's photo!", "12 cats, ünïcode é", "red\tcat\n", "<x> of (it:1.2)"),
    *("日本 🎈", "", "a cat <|endoftext|> of"),
]

if __name__ == "__main__":
    main(Path(sys.argv[1]))
