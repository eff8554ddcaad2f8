"""What a probe is reported beside: logistic regression on the pixels themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from eva_clip.transforms import to_rgb
from probes.draws import shares_images
from probes.principal_axes import find_principal_axes
from probes.results import Baseline
from probes.softmax_path import fit_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from probes.sections import Recipe
    from probes.splits import Split, Splits

PIXEL_SIDE = 32
STRENGTHS = tuple(10 ** (-4 + step / 4) for step in range(25))
"""Inverse regularisation strengths C, from 1e-4 to 100, four a decade."""
NEIGHBOURS = 2
"""Strengths on either side of the chosen one that the range is over: half a decade each way."""
FOLDS = 5
FOLD_STREAM = 0xF01D
"""Second word of the seed of the folds; see `probes.splits.HOLDOUT_STREAM`."""
TOLERANCE = 1e-6
"""Of every fit: solved so far that the last bits of a processor's kernels move no more than a tie."""


def raw_pixels_baseline(recipe: Recipe, splits: Splits, reported: Split) -> Baseline:
    """Fitted on train and what selects, never on what is reported, and scored on that once.

    C has the lowest held-out cross-entropy of a cross-validation, which, unlike an accuracy, is not decided by single
    images.
    """
    skip = recipe.data.on_corrupt == "skip"
    parts, names = [read_pixels(splits.train, skip)], "train"
    if splits.selection is not None and not shares_images(splits.selection, reported):
        parts.append(read_pixels(splits.selection, skip))
        names += f" and {splits.selection.name}"
    pixels, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    test, test_targets = read_pixels(reported, skip)
    with one_thread():
        axes, classes = find_principal_axes(pixels), len(splits.classes)  # the same problem in fewer columns
        train, test = axes.rotate(pixels.double()), axes.rotate(test.double())
        chosen = choose_strength(train, targets, classes, recipe.run.seed)
        last = min(chosen + NEIGHBOURS, len(STRENGTHS) - 1)
        found = [
            100 * float(((test @ point.weight.double().T + point.bias).argmax(dim=1) == test_targets).double().mean())
            for point in fit_path(train, targets, classes, STRENGTHS[: last + 1], tolerance=TOLERANCE)
        ]
    near = found[max(0, chosen - NEIGHBOURS) :]
    low, high = min(near), max(near)
    return Baseline(
        "raw pixels",
        found[chosen],
        f"Logistic regression on centred {PIXEL_SIDE} x {PIXEL_SIDE} RGB pixels of {names}; C = "
        f"{STRENGTHS[chosen]:.3g} has the lowest cross-entropy in {FOLDS}-fold cross-validation. With C up to half a "
        f"decade from it top-1 is {low:.2f} to {high:.2f}. Another processor may move an image or two that are ties.",
        (low, high),
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums do not depend on their number, and on products this small they would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_strength(features: torch.Tensor, targets: torch.Tensor, num_classes: int, seed: int) -> int:
    """Position in `STRENGTHS` of the lowest held-out cross-entropy; the path ends where it has risen for long enough.

    Args:
        features: float64 [N, D].
        targets: int64 [N].
        num_classes: C.
        seed: of the folds.
    """
    fold = torch.from_numpy(draw_folds(targets.numpy(), seed))
    held = [fold == number for number in range(FOLDS) if 0 < int((fold == number).sum()) < len(fold)]
    paths = [fit_path(features[~mask], targets[~mask], num_classes, STRENGTHS, tolerance=TOLERANCE) for mask in held]
    losses: list[float] = []
    for points in zip(*paths, strict=True):
        terms = [
            F.cross_entropy(features[mask] @ point.weight.double().T + point.bias, targets[mask], reduction="sum")
            for mask, point in zip(held, points, strict=True)
        ]
        losses.append(float(sum(terms)))
        if len(losses) - 1 - int(np.argmin(losses)) > NEIGHBOURS:
            break
    return int(np.argmin(losses)) if losses else 0


def draw_folds(targets: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The fold [N], from 0 to `FOLDS` - 1, that each sample is held out in; every class is spread over them evenly."""
    order = np.random.default_rng([seed, FOLD_STREAM]).permutation(len(targets))
    order = order[np.argsort(targets[order], kind="stable")]
    folds = np.empty(len(targets), dtype=np.int64)
    folds[order] = np.arange(len(targets)) % FOLDS
    return folds


def read_pixels(split: Split, skip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels float32 [N, side·side·3] in [0, 1] and targets [N]; unreadable images are left out when `skip`."""
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
    return torch.from_numpy(np.stack(rows)).float() / 255, torch.from_numpy(split.targets[kept])
