"""Accuracy and loss against scikit-learn, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score

from probes.metrics import SplitMeter


def score(logits: torch.Tensor, targets: torch.Tensor, batches: list[int]) -> dict[str, float]:
    meter = SplitMeter(logits.shape[1])
    for some_logits, some_targets in zip(logits.split(batches), targets.split(batches), strict=True):
        meter.update(some_logits, some_targets)
    return meter.compute_and_reset()


@pytest.mark.parametrize("num_classes", [2, 3, 5, 6, 10])
def test_scores_are_scikit_learns_over_an_uneven_last_batch(num_classes):
    torch.manual_seed(num_classes)
    logits, targets = torch.randn(23, num_classes), torch.randint(num_classes, (23,))
    found = score(logits, targets, [10, 10, 3])
    labels, probability = range(num_classes), logits.double().softmax(1).numpy()
    assert found["loss"] == pytest.approx(log_loss(targets, probability, labels=labels), rel=1e-5)
    top1 = (logits.argmax(1) == targets).double().mean().item()
    assert found["acc1"] == pytest.approx(100 * top1, rel=1e-5)
    if num_classes > 5:
        top5 = top_k_accuracy_score(targets, logits, k=5, labels=labels)
        assert found["acc5"] == pytest.approx(100 * top5, rel=1e-5)
        assert found["acc5"] < 100
    else:
        assert found["acc5"] == 100


def test_loss_is_the_mean_over_samples_and_not_over_batches():
    logits = torch.tensor([[10.0, -10.0], [10.0, -10.0], [10.0, -10.0]])
    targets = torch.tensor([0, 0, 1])  # losses 0, 0 and 20
    assert score(logits, targets, [2, 1])["loss"] == pytest.approx(20 / 3, rel=1e-6)


def test_accuracy_is_over_samples_and_not_over_classes():
    logits, targets = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    assert score(logits, targets, [4])["acc1"] == pytest.approx(75)


def test_half_precision_logits_give_a_float32_loss():
    logits, targets = torch.randn(8, 4), torch.randint(4, (8,))
    coarse = logits.bfloat16()
    assert score(coarse, targets, [8])["loss"] == score(coarse.float(), targets, [8])["loss"]


def test_a_meter_starts_anew_after_each_epoch():
    meter = SplitMeter(2)
    meter.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert meter.compute_and_reset()["acc1"] == 0
    meter.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    again = meter.compute_and_reset()
    assert again["acc1"] == 100
    assert again["loss"] < 0.4


def test_meters_add_nothing_to_a_checkpoint():
    assert SplitMeter(3).state_dict() == {}
