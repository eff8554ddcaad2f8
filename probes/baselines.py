"""What a probe is reported beside: a random encoder, raw pixels, zero-shot. All score the reported split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eva_clip.models import NoTextTowerError, build_model
from probes.embedding import embed_images
from probes.extraction import extraction_device
from probes.finite import check_scores
from probes.fit import Fitted, fit_probe
from probes.heads import build_zero_shot_weights
from probes.processes import on_main
from probes.prompts import readable
from probes.raw_pixels import raw_pixels_baseline
from probes.results import Baseline
from probes.scoring import collect_scores

if TYPE_CHECKING:
    from probes.sections import Recipe
    from probes.splits import Split, Splits


def compute_baselines(
    recipe: Recipe, splits: Splits, fitted: Fitted, reported: Split
) -> tuple[list[Baseline], list[str]]:
    """The baselines that a recipe asks for, each trained and chosen on the same samples as the probe.

    Under `join_trainer` the processes share the images of the zero-shot baseline, and the first reads the raw pixels.

    Returns:
        The baselines, and one sentence for each that was asked for and cannot be had.
    """
    found, notes = [], []
    if recipe.baselines.zero_shot:
        try:
            found.append(_zero_shot(recipe, splits, fitted, reported))
        except NoTextTowerError as error:
            why = str(error).partition(", so ")[0]
            notes.append(f"The zero-shot baseline was left out: {why}.")
    if recipe.baselines.raw_pixels:
        found.append(on_main(lambda: raw_pixels_baseline(recipe, splits, reported)))
    if recipe.baselines.random_encoder:
        found.append(_random_encoder(recipe, splits, reported))
    return found, notes


def _random_encoder(recipe: Recipe, splits: Splits, reported: Split) -> Baseline:
    fitted = fit_probe(recipe, splits, weights="random")
    score = collect_scores(fitted.module, len(reported), reported.name)[0]
    return Baseline(
        "same probe, random encoder",
        score.top1,
        f"The recipe with the encoder's weights freshly initialised from seed {recipe.run.seed}.",
    )


@torch.no_grad()
def _zero_shot(recipe: Recipe, splits: Splits, fitted: Fitted, reported: Split) -> Baseline:
    size = recipe.model.image_size
    model, _ = build_model(recipe.model.name, recipe.model.weights, image_size=size, pos_embed=recipe.model.pos_embed)
    model.to(extraction_device())
    names = [readable(name) for name in splits.classes]
    weights = build_zero_shot_weights(model, names, [recipe.baselines.prompt]).cpu()
    images, index = embed_images(model, fitted.data.loader(reported.name, 64), reported.name)
    scores = images @ weights.T
    check_scores(scores, index, reported)
    right = scores.argmax(dim=1) == torch.from_numpy(reported.targets)[index]
    return Baseline(
        "zero-shot",
        100 * float(right.float().mean()),
        f"Class names through the model's own text tower, prompt {recipe.baselines.prompt!r}; nothing is trained.",
    )
