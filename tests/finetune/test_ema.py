from __future__ import annotations

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from finetune.ema import WeightAverage


def steps(model: nn.Module, count: int):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)
        yield


def test_equals_timm():
    model = nn.Linear(4, 3)
    ours, theirs = WeightAverage(model, 0.9), ModelEmaV3(model, decay=0.9)
    for _ in steps(model, 20):
        ours.update(model)
        theirs.update(model)
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(ours.average[name], parameter, rtol=1e-6, atol=1e-7)
    assert ours.updates == 20


def test_half_precision_weights_have_a_full_precision_average():
    model = nn.Linear(1, 1, bias=False).half()
    nn.init.ones_(model.weight)
    average = WeightAverage(model, 0.9999)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(10):
        average.update(model)
    assert average.average["weight"].item() == pytest.approx(2 - 0.9999**10, rel=1e-6)  # fp16 would have stayed at 1


def test_applied_and_back():
    model = nn.Linear(4, 3)
    average = WeightAverage(model, 0.5)
    for _ in steps(model, 3):
        average.update(model)
    raw = [parameter.clone() for parameter in model.parameters()]
    with average.applied(model):
        assert torch.equal(model.weight, average.average["weight"])
    assert all(torch.equal(a, b) for a, b in zip(raw, model.parameters(), strict=True))


def test_frozen_parameters_are_left_out_and_state_round_trips():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, 0.5)
    assert list(average.average) == ["weight"]
    for _ in steps(model, 2):
        average.update(model)
    other = WeightAverage(nn.Linear(4, 3).requires_grad_(False), 0.5)
    with pytest.raises(ValueError, match="other parameters"):
        other.load_state_dict(average.state_dict())
    restored = WeightAverage(model, 0.5)
    restored.load_state_dict(average.state_dict())
    assert restored.updates == 2
    assert torch.equal(restored.average["weight"], average.average["weight"])


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="expected at least 0 and below 1"):
        WeightAverage(nn.Linear(1, 1), decay)
