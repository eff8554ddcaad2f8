"""The head that training starts from, and the weights of its classes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from probes.class_weights import balanced_weights, positive_weights
from probes.embedding import build_towers
from probes.heads import build_head, build_zero_shot_weights
from probes.prompts import readable

if TYPE_CHECKING:
    from probes.sections import Recipe
    from probes.splits import Splits


def start_head(recipe: Recipe, classes: list[str], feature_dim: int, weights: str = "") -> nn.Sequential:
    """The recipe's head, drawn from torch's present random state or made of the classes' texts.

    Args:
        recipe: the recipe.
        classes: C labels.
        feature_dim: D.
        weights: replaces the recipe's encoder weights.

    Raises:
        NoTextTowerError: the model has no text tower to start from.
    """
    head = build_head(recipe.head.kind, feature_dim, len(classes))
    if recipe.head.start == "zero_shot":
        model = dataclasses.replace(recipe.model, weights=weights or recipe.model.weights)
        towers = build_towers(model, recipe.trainer.precision)
        texts = build_zero_shot_weights(towers, [readable(label) for label in classes], [recipe.head.prompt])
        linear = head[-1]
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(towers.logit_scale.exp().float() * texts)
    return head


def recipe_class_weights(recipe: Recipe, splits: Splits) -> torch.Tensor | None:
    """Weight of each class [C], with several labels an image of its positives; or None for equal ones."""
    if recipe.head.class_weights == "none":
        return None
    shown = splits.train.multi_hot
    if shown is not None:
        return positive_weights(torch.from_numpy(shown.sum(axis=0)), len(shown))
    return balanced_weights(torch.bincount(torch.from_numpy(splits.train.targets), minlength=len(splits.classes)))
