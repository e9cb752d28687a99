"""Sentences that hold the new word while it is learned.

Short neutral captions, so that the word takes on what the images share and nothing of the context;
after the idea of CLIP's and Textual Inversion's prompt lists (Gal et al. 2022, section 3), own
selection.
"""

from typing import Literal

LearnableProperty = Literal["object", "style"]

OBJECT_TEMPLATES = (
    # Without an article as well: "a photo of <cat-toy>" is how the word will be used.
    "a photo of {}",
    "a picture of {}",
    "a photo of a {}",
    "a photo of the {}",
    "a photo of my {}",
    "a good photo of a {}",
    "a nice photo of the {}",
    "a clean photo of the {}",
    "a bright photo of the {}",
    "a cropped photo of the {}",
    "a close-up photo of a {}",
    "a close-up photo of the {}",
    "a photo of a small {}",
    "a photo of a large {}",
    "a photo of the clean {}",
    "a photo of a nice {}",
    "a picture of a {}",
    "an image of the {}",
    "a rendering of a {}",
    "a rendering of the {}",
    "a rendition of a {}",
    "a rendition of the {}",
    "an illustration of a {}",
    "a depiction of the {}",
    "a {}",
)

STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a picture in the style of {}",
    "a drawing in the style of {}",
    "an illustration in the style of {}",
    "a photo in the style of {}",
    "a depiction in the style of {}",
    "a rendition in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a cropped painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a nice painting in the style of {}",
    "a large painting in the style of {}",
)


def templates_for(learnable_property: LearnableProperty) -> tuple[str, ...]:
    """The templates of an object or of a style; each holds one `{}`."""
    return OBJECT_TEMPLATES if learnable_property == "object" else STYLE_TEMPLATES
