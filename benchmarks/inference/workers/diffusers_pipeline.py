"""`StableDiffusionPipeline` with DDIM: eager, compiled, in bfloat16, or optimum's.

settings: model, kind ("eager", "compiled", "bfloat16" or "optimum").
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import Array, read_settings, serve


class DiffusersSystem:
    """A pipeline as its users load it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from diffusers import DDIMScheduler

        self._kind = settings["kind"]
        self.pipe: Any = self._load(Path(settings["model"]), Path(settings["exported"]))
        # PNDM's config, as Stable Diffusion 1.5 has it, does not say that nothing is clipped.
        self.pipe.scheduler = DDIMScheduler.from_config(
            self.pipe.scheduler.config, clip_sample=False
        )
        self.pipe.set_progress_bar_config(disable=True)
        self._dtype = torch.bfloat16 if self._kind == "bfloat16" else torch.float32
        if self._kind == "compiled":
            self.pipe.unet = torch.compile(self.pipe.unet)

    def _load(self, model: Path, exported: Path) -> Any:
        if self._kind != "optimum":
            from diffusers import StableDiffusionPipeline

            dtype = torch.bfloat16 if self._kind == "bfloat16" else torch.float32
            return StableDiffusionPipeline.from_pretrained(
                model, safety_checker=None, torch_dtype=dtype
            )
        from optimum.exporters.onnx import (  # pyright: ignore[reportMissingImports]
            main_export,
        )
        from optimum.onnxruntime import (  # pyright: ignore[reportMissingImports]
            ORTStableDiffusionPipeline,
        )

        if not (exported / "model_index.json").exists():
            task = "text-to-image"
            main_export(str(model), exported, task=task, library_name="diffusers")
        return ORTStableDiffusionPipeline.from_pretrained(exported)

    @torch.no_grad()
    def call(self, feeds: dict[str, Array]) -> Array:
        latents, embeds = (
            torch.from_numpy(feeds[name]).to(self._dtype) for name in ("latents", "prompt_embeds")
        )
        # One number for all rows: optimum's graph takes no more.
        timestep = torch.tensor(float(feeds["timestep"][0]))
        noise_pred = self.pipe.unet(latents, timestep, embeds, return_dict=False)[0]
        return noise_pred.float().numpy()

    def peak(self) -> float:
        return 0.0

    def draw(self, work: dict[str, Any]) -> Array:
        return (
            self.pipe(
                work["prompt"],
                width=work["pixels"],
                height=work["pixels"],
                num_inference_steps=work["steps"],
                guidance_scale=work["guidance"],
                generator=torch.Generator("cpu").manual_seed(work["seed"]),
                output_type="np",
            )
            .images[0]
            .astype(np.float64)
        )


if __name__ == "__main__":
    settings = read_settings()
    serve(DiffusersSystem(settings), settings)
