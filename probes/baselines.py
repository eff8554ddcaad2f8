"""What a probe is reported beside: a random encoder, raw pixels, zero-shot. All score the reported split."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from eva_clip.models import NoTextTowerError, build_model
from eva_clip.transforms import to_rgb
from probes.embedding import embed_images
from probes.finite import check_scores
from probes.fit import Fitted, fit_probe
from probes.heads import build_zero_shot_weights
from probes.prompts import readable
from probes.results import Baseline
from probes.scoring import collect_scores
from probes.splits import choose_holdout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from probes.sections import Recipe
    from probes.splits import Split, Splits

PIXEL_SIDE = 32
REGULARISATION_PATH = (1e-2, 1e-1, 1.0)
"""Inverse regularisation strengths C that the raw-pixel baseline chooses from."""
INNER_HOLDOUT = 0.15
"""Share of train that chooses C where the recipe has no selection split."""


def compute_baselines(
    recipe: Recipe, splits: Splits, fitted: Fitted, reported: Split
) -> tuple[list[Baseline], list[str]]:
    """The baselines that a recipe asks for, each trained and chosen on the same samples as the probe.

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
        found.append(_raw_pixels(recipe, splits, reported))
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


def _raw_pixels(recipe: Recipe, splits: Splits, reported: Split) -> Baseline:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    # Centred but not scaled: dividing by the deviation of a nearly constant border pixel breaks on shifted data.
    def fit(strength: float, pixels: NDArray[np.float32], targets: NDArray[np.int64]) -> object:
        return make_pipeline(StandardScaler(with_std=False), LogisticRegression(C=strength, max_iter=200)).fit(
            pixels, targets
        )

    skip = recipe.data.on_corrupt == "skip"
    train, targets = _read_pixels(splits.train, skip)
    test, test_targets = _read_pixels(reported, skip)
    if splits.selection is not None and splits.selection is not reported:
        held, held_targets = _read_pixels(splits.selection, skip)
        train, targets = np.concatenate([train, held]), np.concatenate([targets, held_targets])
        chooses = np.arange(len(targets)) >= len(targets) - len(held_targets)
        chooser = splits.selection.name
    else:
        positions = [str(position) for position in range(len(targets))]
        chooses = choose_holdout(targets, positions, INNER_HOLDOUT, recipe.run.seed)
        chooser = f"{INNER_HOLDOUT:.0%} of train"
    # These products are small: threads would wait for each other longer than they compute.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # early stopping is one more regulariser here
        # One image a class leaves nothing to choose on: all strengths tie, and the strongest regularisation is taken.
        scores = (
            [0.0]
            if not chooses.any()
            else [
                fit(c, train[~chooses], targets[~chooses]).score(train[chooses], targets[chooses])  # type: ignore[attr-defined]
                for c in REGULARISATION_PATH
            ]
        )
        strength = REGULARISATION_PATH[int(np.argmax(scores))]
        model = fit(strength, train, targets)
    score = 100 * float(model.score(test, test_targets))  # type: ignore[attr-defined]
    return Baseline(
        "raw pixels",
        score,
        f"Logistic regression on centred {PIXEL_SIDE} x {PIXEL_SIDE} RGB pixels; C = {strength:g} was chosen on "
        f"{chooser}, then fitted to all of it.",
    )


def _read_pixels(split: Split, skip: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels [N, side·side·3] in [0, 1] and targets [N]; unreadable images are left out when `skip`."""
    rows, kept = [], []
    for position, index in enumerate(split.indices):
        try:
            image = to_rgb(split.source.image(int(index)))
        except Exception:  # Pillow raises many kinds; see `probes.data`
            if not skip:
                raise
            continue
        rows.append(np.asarray(image.resize((PIXEL_SIDE, PIXEL_SIDE), Image.Resampling.BICUBIC)).reshape(-1))
        kept.append(position)
    pixels: NDArray[np.float32] = np.stack(rows).astype(np.float32)
    return pixels / np.float32(255), split.targets[kept]


@torch.no_grad()
def _zero_shot(recipe: Recipe, splits: Splits, fitted: Fitted, reported: Split) -> Baseline:
    size = recipe.model.image_size
    model, _ = build_model(recipe.model.name, recipe.model.weights, image_size=size, pos_embed=recipe.model.pos_embed)
    names = [readable(name) for name in splits.classes]
    weights = build_zero_shot_weights(model, names, [recipe.baselines.prompt])
    images, index = embed_images(model, fitted.data.loader(reported.name, 64), reported.name)
    scores = images @ weights.T
    check_scores(scores, index, reported)
    right = scores.argmax(dim=1) == torch.from_numpy(reported.targets)[index]
    return Baseline(
        "zero-shot",
        100 * float(right.float().mean()),
        f"Class names through the model's own text tower, prompt {recipe.baselines.prompt!r}; nothing is trained.",
    )
