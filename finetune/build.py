"""The classifier of a recipe: built, loaded, started and frozen as it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eva_clip.classifier import Classifier, build_class_head, build_classifier
from eva_clip.specs import add_model_config
from finetune.adapters import freeze
from finetune.contrastive import attach_texts
from finetune.drop_path import skip_dropped_paths
from finetune.head_start import build_class_texts, build_start_head
from finetune.sections import FinetuneRecipe
from probes.sections import RecipeError

if TYPE_CHECKING:
    from probes.splits import Splits


def build_untrained(recipe: FinetuneRecipe, num_classes: int, weights: str | None) -> Classifier:
    """The recipe's classifier with what is not trained frozen; `weights` None leaves it randomly initialised."""
    if recipe.model.config:
        add_model_config(recipe.model.config)
    model = build_classifier(
        recipe.model.name,
        num_classes,
        image_size=recipe.model.image_size,
        pool=recipe.head.pool,
        head=recipe.head.kind,
        checkpoint=weights,
        drop_path_rate=recipe.regularisation.drop_path,
        pos_embed=recipe.model.pos_embed,
    )
    if recipe.regularisation.skip_dropped:
        skip_dropped_paths(model.tower)
    freeze(model, recipe.tune)
    return model


def build_recipe_classifier(recipe: FinetuneRecipe, splits: Splits) -> tuple[Classifier, list[str]]:
    """The classifier that training starts from, and notes on what was loaded.

    Raises:
        RecipeError: `head.start` is "checkpoint" and the file's head does not fit.
        ValueError: the weights do not fit.
    """
    weights = None if recipe.model.weights == "random" else recipe.model.weights
    torch.manual_seed(recipe.run.seed)
    model = build_untrained(recipe, len(splits.classes), weights)
    report = model.load_report
    notes = [f"{recipe.model.name}: {report.summary() if report else 'randomly initialised'}"]
    fresh = report is None or any(name.startswith("classifier.") for name in report.missing)
    start = recipe.head.start
    if start == "checkpoint" and fresh:
        raise RecipeError(
            f"head.start is 'checkpoint' and the head of {recipe.model.weights} is not of kind {recipe.head.kind!r}; "
            "set head.kind to the file's, or use head.start=fresh for a new head"
        )
    if start == "fresh" and not fresh:
        model.head = build_class_head(recipe.head.kind, model.spec.vision.width, model.num_classes)
        notes.append("the file's head was not taken: head.start is 'fresh'")
    if recipe.head.objective == "contrastive":
        attach_texts(model, build_class_texts(recipe, splits))
        notes.append("the head is made of the classes' texts, whose tower trains along")
    elif start in ("probe", "zero_shot", "linear_probe"):
        head = build_start_head(recipe, splits)
        assert isinstance(model.head, torch.nn.Linear)
        with torch.no_grad():
            model.head.weight.copy_(head.weight)
            model.head.bias.copy_(head.bias)
        notes.append(head.note)
    if recipe.trainer.checkpointing:
        model.tower.set_grad_checkpointing(True)
    if recipe.trainer.compile:
        for block in model.tower.blocks:  # block by block: equal blocks share one compilation, and names stay
            block.compile()
    return model.train(), notes  # Lightning leaves a module in the mode that it comes in
