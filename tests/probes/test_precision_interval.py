"""Bootstrap interval of mean average precision against scikit-learn on resampled images."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from probes.intervals import _weighted_precision, precision_interval


def make_images(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and three classes of different rarity."""
    generator = np.random.default_rng(seed)
    shown = generator.random((samples, 3)) < [0.5, 0.2, 0.05]
    shown[0] = True
    scores = np.round(generator.normal(size=(samples, 3)) + 1.5 * shown, 1).astype(np.float32)
    return scores, shown


def test_a_resample_is_scikit_learns_with_sample_weights():
    scores, shown = make_images(200)
    counts = np.random.default_rng(1).multinomial(200, np.full(200, 1 / 200), size=7)
    for c in range(3):
        expected = [average_precision_score(shown[:, c], scores[:, c], sample_weight=row) for row in counts]
        np.testing.assert_allclose(_weighted_precision(scores[:, c], shown[:, c], counts), expected, atol=1e-12)


def test_it_covers_the_mean_in_about_the_stated_share_of_draws():
    """Images of one distribution: its mean average precision is that of a very large sample."""
    scores, shown = make_images(20_000)
    truth = 100 * average_precision_score(shown, scores, average="macro")
    found = [precision_interval(*make_images(300, seed), resamples=200) for seed in range(1, 61)]
    within = sum(low <= truth <= high for low, high in found)
    assert within >= 48, "of 60; few images of the rare class make it somewhat too narrow"
    assert all(high - low < 25 for low, high in found)


def test_classes_without_images_have_no_part():
    scores, shown = make_images(100)
    alone = precision_interval(scores[:, :2], shown[:, :2])
    shown[:, 2] = False
    assert precision_interval(scores, shown) == pytest.approx(alone)
