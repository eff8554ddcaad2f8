"""The frozen encoder that a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_clip.encoder import FeatureDefinition, VisionEncoder, build_encoder
from eva_clip.specs import add_model_config, get_model_spec

if TYPE_CHECKING:
    from eva_clip.checkpoints import LoadReport
    from eva_clip.spec_types import ModelSpec
    from probes.sections import Recipe


def build_recipe_encoder(recipe: Recipe, weights: str = "") -> tuple[VisionEncoder, LoadReport | None]:
    """The frozen encoder of a recipe; `weights` replaces the recipe's when given.

    Raises:
        ValueError: see `eva_clip.build_encoder`.
        FileNotFoundError: no such weights file.
    """
    if recipe.model.config:
        add_model_config(recipe.model.config)
    features = recipe.features
    return build_encoder(
        recipe.model.name,
        weights or recipe.model.weights,
        definition=FeatureDefinition(features.pool, features.projected, features.l2norm),
        image_size=recipe.model.image_size,
        pos_embed=recipe.model.pos_embed,
        precision=recipe.trainer.precision,
    )


def recipe_spec(recipe: Recipe) -> ModelSpec:
    """The model of a recipe at its resolution; builds nothing."""
    if recipe.model.config:
        add_model_config(recipe.model.config)
    spec = get_model_spec(recipe.model.name)
    return spec.at_image_size(recipe.model.image_size) if recipe.model.image_size else spec
