"""diffusers' own script for Textual Inversion, run as its README says.

The script is not part of this repository: fetch it from `URL`. It wants torchvision for one class,
`RandomHorizontalFlip`; where torchvision is not installed, this module stands in for that class.
"""

import hashlib
import os
import random
import runpy
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.learning.judge import CONCEPTS
from benchmarks.peers import MODEL, ROOT

COMMIT = "58eb52c0803ea9af3abec60841c2a093bdf1f951"
URL = (
    f"https://raw.githubusercontent.com/huggingface/diffusers/{COMMIT}/"
    "examples/textual_inversion/textual_inversion.py"
)
SHA256 = "7577661c8a3d6c194abf1c12c58b5b790ce916d782a7d293c60f3b0672232933"
SCRIPT = ROOT / "build" / "learning" / "textual_inversion.py"
RUNS = ROOT / "build" / "learning" / "peer"
STEPS, ACCUMULATION = 3000, 4  # of the README, with one image a pass
SAVE_STEPS = 100

# The script must be given one token: the nearest object that the embedded model knows.
INITIALIZERS = {
    "fox": "dog",
    "octopus": "squid",
    "owl": "bird",
    "teddy-bear": "bear",
    "tractor": "bus",
    "guitar": "violin",
    "rocket": "airplane",
    "sunflower": "tulip",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRun:
    """A finished run of the script."""

    folder: Path

    def vectors(self, step: int = STEPS) -> Tensor:
        """float32 [1, dim] after a step, of those that were saved."""
        (vectors,) = load_file(self._file(step)).values()
        return vectors.reshape(1, -1).float()

    def _file(self, step: int) -> Path:
        return self.folder / f"learned_embeds-steps-{step}.safetensors"


def run(concept: str, seed: int) -> PeerRun:
    """Run the script on one folder of images, unless that was done already."""
    folder = RUNS / f"{concept}-{seed}"
    if not (folder / "learned_embeds.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log").open("w") as log:
            subprocess.run(
                command(concept, folder, seed=seed, steps=STEPS), cwd=ROOT, env=environment(),
                stdout=log, stderr=subprocess.STDOUT, check=True,
            )  # fmt: skip
    return PeerRun(folder=folder)


def command(
    concept: str, output: Path, *, seed: int, steps: int, batch_size: int = 1,
    accumulation: int = ACCUMULATION, save_steps: int = SAVE_STEPS,
) -> list[str]:  # fmt: skip
    """The README's command, but for model, images and resolution; no checkpoints of its own."""
    options = {
        "pretrained_model_name_or_path": MODEL,
        "train_data_dir": CONCEPTS / concept,
        "learnable_property": "object",
        "placeholder_token": "<word>",
        "initializer_token": INITIALIZERS[concept],
        "resolution": 64,
        "train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_train_steps": steps,
        "learning_rate": 5.0e-04,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "seed": seed,
        "save_steps": save_steps,
        "checkpointing_steps": 10**9,
        "output_dir": output,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "benchmarks.learning.peer", str(SCRIPT), *flags, "--scale_lr"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def check_script() -> None:
    """Exits with what to do where the script is missing or another one."""
    if not SCRIPT.is_file():
        sys.exit(f"no {SCRIPT}; fetch it: curl --create-dirs -o {SCRIPT} {URL}")
    if hashlib.sha256(SCRIPT.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{SCRIPT} is not the script of diffusers {COMMIT[:8]}: delete it, fetch {URL}")


class RandomHorizontalFlip:
    """As torchvision's: an image mirrored with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if random.random() < self.p else image


def _main() -> None:
    """Run the script of the first argument with the others, as `python SCRIPT ...` would."""
    # transformers must have looked for torchvision before there is a stand-in.
    import diffusers
    import transformers

    _ = transformers.CLIPTextModel, diffusers.StableDiffusionPipeline  # pyright: ignore
    if "torchvision" not in sys.modules:
        package, transforms = (
            types.ModuleType(name) for name in ("torchvision", "torchvision.transforms")
        )
        vars(transforms)["RandomHorizontalFlip"] = RandomHorizontalFlip
        vars(package)["transforms"] = transforms
        sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main()
