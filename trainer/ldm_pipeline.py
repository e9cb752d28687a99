"""The pipeline of latent diffusion models in diffusers, with the concepts that it lacks."""

from typing import Any

from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMTextToImagePipeline


class LDMConceptPipeline(TextualInversionLoaderMixin, LDMTextToImagePipeline):
    """`LDMTextToImagePipeline` with diffusers' own loader of concepts.

    Give it lower-case placeholders: a `BertTokenizer` finds added tokens in lower-cased text and
    calls them so, and diffusers, which looks for `<Cat-Toy>`, does not put in its second vector.
    """

    def __call__(
        self,
        prompt: str | list[str],
        *arguments: Any,
        negative_prompt: str | None = None,
        **options: Any,
    ) -> Any:
        """Draw; raises `ValueError` for a negative prompt, which the pipeline would ignore."""
        if negative_prompt is not None:
            raise ValueError(
                f"negative_prompt is {negative_prompt!r}, LDMTextToImagePipeline always takes the "
                "empty one; leave it out"
            )
        tokenizer: Any = self.tokenizer
        converted = self.maybe_convert_prompt(prompt, tokenizer)
        return super().__call__(converted, *arguments, **options)
