"""Training language models from recipes, on the Hugging Face Trainer."""

from miras.train.config import Recipe, read_recipe, recipe_from

__all__ = ["Recipe", "read_recipe", "recipe_from"]
