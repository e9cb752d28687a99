"""What the recipe raises on purpose."""


class RecipeError(Exception):
    """The recipe cannot go on; the message says what is wrong and what to do about it."""
