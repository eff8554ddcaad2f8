"""Binary cross-entropy, mixing and mean average precision of several labels an image, against formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from finetune.sections import AugmentSection
from finetune.targets import Mixer, classification_losses
from probes.class_weights import positive_weights
from probes.multi_label_meter import build_meter

SAMPLES, CLASSES = 60, 4


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shown() -> torch.Tensor:
    """bool [N, C]; class 2 never occurs."""
    rows = torch.rand(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1)) < 0.3
    rows[:, 2] = False
    return rows


def test_the_loss_is_the_formula(logits, shown):
    weights = positive_weights(shown.sum(dim=0), SAMPLES)
    for n in (0, 1, 3):
        positives = int(shown[:, n].sum())
        assert float(weights[n]) == pytest.approx((SAMPLES - positives) / positives)
    assert float(weights[2]) == 1
    target, p = 0.9 * shown.double().numpy() + 0.05, 1 / (1 + np.exp(-logits.double().numpy()))
    w = weights.double().numpy()
    expected = -(w * target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
    for targets in (shown, shown.float()):
        found = classification_losses(logits, targets, 0.1, weights, multi_label=True)
        assert float(found.mean()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_mixed_labels_are_shares_of_two_images(way, shown):
    torch.manual_seed(0)
    rows = shown[:8]
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    mixed, target = Mixer(AugmentSection(**{way: 1.0}), CLASSES)(images, rows)
    share = None
    for n in range(8):  # every image is mixed with the one before it, all by one share
        values = mixed[n].mean()
        share = float((values - (n - 1) % 8) / (n - (n - 1) % 8)) if share is None else share
        assert float(values) == pytest.approx(share * n + (1 - share) * ((n - 1) % 8), abs=1e-4)
        expected = share * rows[n].float() + (1 - share) * rows[n - 1].float()
        torch.testing.assert_close(target[n], expected, atol=1e-4, rtol=0)
    assert 0 < share < 1


def test_the_score_is_that_of_scikit_learn(logits, shown):
    meter = build_meter(CLASSES, multi_label=True)
    meter.update(logits[:25], shown[:25])
    meter.update(logits[25:], shown[25:])
    present = [0, 1, 3]
    expected = 100 * average_precision_score(shown[:, present], logits[:, present], average="macro")
    values = meter.compute_and_reset()
    assert values["mean_ap"] == pytest.approx(expected, abs=1e-3)
    assert values["loss"] == pytest.approx(float(classification_losses(logits, shown, 0.0).mean()), rel=1e-5)
    meter.update(logits[:25], shown[:25])
    first = 100 * average_precision_score(shown[:25, present], logits[:25, present], average="macro")
    assert meter.compute_and_reset()["mean_ap"] == pytest.approx(first, abs=1e-3)


def test_large_logits_keep_their_order(shown):
    order = torch.linspace(18, 30, SAMPLES)[:, None].expand(SAMPLES, CLASSES)
    meter = build_meter(CLASSES, multi_label=True)
    meter.update(order, shown)
    present = [0, 1, 3]
    expected = 100 * average_precision_score(shown[:, present], order[:, present], average="macro")
    assert meter.compute_and_reset()["mean_ap"] == pytest.approx(expected, abs=1e-3)


def test_the_training_score_continues_from_a_checkpoint(logits, shown):
    whole, first, second = (build_meter(CLASSES, multi_label=True, train=True) for _ in range(3))
    whole.update(logits, shown)
    first.update(logits[:30], shown[:30])
    second.load_totals(first.totals())
    second.update(logits[30:], shown[30:])
    assert second.compute_and_reset() == pytest.approx(whole.compute_and_reset())
