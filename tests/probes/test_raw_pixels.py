"""The raw-pixel baseline against scikit-learn, and how little the last bits of a processor's kernels move it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_score

from probes import raw_pixels
from probes.raw_pixels import FOLDS, choose_strength, draw_folds, raw_pixels_baseline, read_pixels
from probes.recipe import load_recipe
from probes.sections import Recipe
from probes.splits import prepare_splits

STRENGTHS = tuple(10.0 ** np.arange(-4, 1))


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch):
    monkeypatch.setattr(raw_pixels, "STRENGTHS", STRENGTHS)
    monkeypatch.setattr(raw_pixels, "NEIGHBOURS", 1)


@pytest.fixture
def build(png_digits, tmp_path):
    """`build(*overrides)`: a recipe on digits with its data."""

    def prepare(*overrides: str):
        path = tmp_path / "recipe.yaml"
        path.write_text("data: {workers: 0}\n", encoding="utf-8")
        recipe = load_recipe(
            path, [f"data.train={png_digits.train}", f"data.test={png_digits.test}", *overrides], Recipe
        )
        return recipe, prepare_splits(recipe.data)

    return prepare


def by_scikit_learn(train: list, test, seed: int) -> tuple[int, list[float]]:
    """Position of the strength that is chosen, and top-1 on test of every strength."""
    parts = [read_pixels(split, False) for split in train]
    pixels, targets = (np.concatenate([part[column].double().numpy() for part in parts]) for column in (0, 1))
    targets = targets.astype(int)
    test_pixels, test_targets = (column.numpy() for column in read_pixels(test, False))
    mean = pixels.mean(axis=0)
    models = [LogisticRegression(C=c, tol=1e-7, max_iter=5000) for c in STRENGTHS]
    folds = draw_folds(targets, seed)
    gains = [
        cross_val_score(model, pixels - mean, targets, cv=PredefinedSplit(folds), scoring="neg_log_loss").mean()
        for model in models
    ]
    fitted = [model.fit(pixels - mean, targets) for model in models]
    return int(np.argmax(gains)), [100 * model.score(test_pixels - mean, test_targets) for model in fitted]


@pytest.mark.parametrize("case", ["test", "holdout chooses", "holdout is reported"])
def test_the_figure_and_its_range_are_scikit_learns(case, build):
    changes = {"test": ["data.holdout=0.0"], "holdout is reported": ["data.test=null", "data.holdout=0.25"]}
    recipe, splits = build(*changes.get(case, ["data.holdout=0.25"]))
    reported = splits.test or splits.selection
    fitted = [splits.train, splits.selection] if case == "holdout chooses" else [splits.train]
    position, top1 = by_scikit_learn(fitted, reported, recipe.run.seed)
    found = raw_pixels_baseline(recipe, splits, reported)
    assert f"C = {STRENGTHS[position]:.3g} has the lowest cross-entropy in 5-fold" in found.note
    image = 100 / len(reported) + 0.01  # that is nearly a tie
    assert found.top1 == pytest.approx(top1[position], abs=image)
    near = top1[max(0, position - 1) : position + 2]
    assert found.spread == pytest.approx((min(near), max(near)), abs=image)
    assert found.spread[0] <= found.top1 <= found.spread[1]
    assert f"{found.spread[0]:.2f} to {found.spread[1]:.2f}" in found.note
    assert ("of train and holdout" in found.note) == (case == "holdout chooses")


def test_last_bits_move_neither_the_choice_nor_the_figure(build, monkeypatch):
    """As another processor's kernels round, a thousand times over."""
    recipe, splits = build("data.holdout=0.0")
    first = raw_pixels_baseline(recipe, splits, splits.test)
    assert first == raw_pixels_baseline(recipe, splits, splits.test)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def shaken(split, skip, generator=generator):
            pixels, targets = read_pixels(split, skip)
            return pixels * (1 + 1e-4 * (torch.rand(pixels.shape, generator=generator) - 0.5)), targets

        monkeypatch.setattr(raw_pixels, "read_pixels", shaken)
        again = raw_pixels_baseline(recipe, splits, splits.test)
        assert again.note.partition("With C")[0] == first.note.partition("With C")[0]
        assert again.top1 == pytest.approx(first.top1, abs=100 / len(splits.test) + 0.01)


def test_folds_hold_every_sample_out_once_and_spread_the_classes():
    targets = np.repeat([0, 1, 2], [10, 7, 26])
    folds = draw_folds(targets, 3)
    assert np.bincount(folds).max() - np.bincount(folds).min() <= 1
    for target in range(3):
        counts = np.bincount(folds[targets == target], minlength=FOLDS)
        assert counts.max() - counts.min() <= 1
    assert (folds != draw_folds(targets, 4)).any()
    assert (folds == draw_folds(targets, 3)).all()


@pytest.mark.parametrize("targets", [[0, 1], [0, 0, 1], [0, 1, 2, 3, 4, 5], [0] * 9 + [1]])
def test_few_images_have_a_choice(targets):
    features = torch.randn(len(targets), 3, generator=torch.Generator().manual_seed(0)).double()
    assert choose_strength(features, torch.tensor(targets), max(targets) + 1, 0) in range(len(STRENGTHS))


def test_the_range_is_printed_and_stored(run_cli, png_digits, tiny_model, tmp_path):
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0", "features.mode=cached"]
    small = ["trainer.global_batch=12", "trainer.micro_batch=12", "trainer.precision=fp32", "schedule.epochs=1"]
    (tmp_path / "recipe.yaml").write_text("baselines: {raw_pixels: true}\nschedule: {warmup_epochs: 0}\n")
    done = run_cli(["recipe.yaml", *tiny_model.overrides, *data, *small, "run.dir=run"], tmp_path)
    assert done.code == 0, done.err
    (baseline,) = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["baselines"]
    low, high = baseline["spread"]
    assert (
        f"raw pixels (ours {-baseline['top1'] + float(done.out.split('last  top-1')[1].split()[0]):+.2f}; " in done.out
    )
    assert f"{low:.2f} to {high:.2f} with settings near it)" in done.out
