"""What a recipe with a bank of heads would train, without training it. Torch waits until a plan is asked for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eva_clip.encoder import FeatureDefinition
    from probes.sections import Recipe


def bank_kinds(recipe: Recipe) -> list[str]:
    """The features that the heads of a recipe's bank see, named like `features.pool`."""
    return recipe.bank.kinds or [recipe.features.pool]


def bank_features(recipe: Recipe, kind: str) -> FeatureDefinition:
    """The definition of one of these features."""
    from eva_clip.encoder import FeatureDefinition

    return FeatureDefinition(kind, recipe.features.projected, recipe.features.l2norm)


def plan_bank(recipe: Recipe) -> dict[str, Any]:
    """The content of `python -m probes.linear RECIPE --plan` for a bank.

    `heads` is their number and `feature_dims` the width of what they see. `lr_by_epoch` and `min_lr_by_epoch` are those
    of the highest and the lowest learning rate; `trainable_parameters` those of all heads.
    """
    from probes.encoder import recipe_spec
    from probes.plan import plan_linear

    bank, spec = recipe.bank, recipe_spec(recipe)
    highest = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, lr=max(bank.lrs)))
    planned = plan_linear(highest)
    dims = {kind: bank_features(recipe, kind).feature_dim(spec) for kind in bank_kinds(recipe)}
    settings = len(bank.lrs) * max(1, len(bank.weight_decays))
    trainable = settings * sum(planned["num_classes"] * (dim + 1) for dim in dims.values())
    tower = planned["total_parameters"] - planned["trainable_parameters"]
    del planned["feature_dim"]
    return {
        "heads": settings * len(dims),
        **planned,
        "min_lr_by_epoch": [rate * min(bank.lrs) / max(bank.lrs) for rate in planned["lr_by_epoch"]],
        "trainable_parameters": trainable,
        "total_parameters": tower + trainable,
        "feature_dims": dims,
    }
