"""Heads as published: initial weights, BatchNorm, and class embeddings from the text tower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eva_clip.models import build_model
from eva_clip.tokenizer import tokenize
from probes.heads import build_head, build_zero_shot_weights


@pytest.mark.parametrize("kind", ["bn_linear", "linear"])
def test_initial_weights_are_the_published_distribution(kind):
    torch.manual_seed(0)
    linear = build_head(kind, 512, 400)[-1]
    weight = linear.weight.detach()
    assert weight.shape == (400, 512)
    assert weight.mean().abs() < 1e-4  # 5 standard errors are 1.1e-4
    assert weight.std() == pytest.approx(0.01, rel=0.01)
    # Not truncated: 2.7 in 1000 normal values lie beyond 3 standard deviations, and of 204,800 some beyond 4.
    assert (weight.abs() > 0.03).float().mean() == pytest.approx(0.0027, rel=0.15)
    assert weight.abs().max() > 0.04
    assert torch.equal(linear.bias, torch.zeros(400))


def test_batch_norm_is_the_published_one_and_has_no_parameters():
    head = build_head("bn_linear", 6, 3)
    assert isinstance(head[0], nn.BatchNorm1d)
    assert head[0].eps == 1e-6
    assert head[0].affine is False
    assert sum(p.numel() for p in head.parameters()) == 6 * 3 + 3


def test_logits_are_of_normalised_features():
    head = build_head("bn_linear", 6, 3).train()
    features = torch.randn(8, 6) * 5 + 2
    normalised = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(head(features), normalised @ head[1].weight.T + head[1].bias)


def test_plain_linear_head_leaves_features_as_they_are():
    head, features = build_head("linear", 6, 3), torch.randn(8, 6)
    torch.testing.assert_close(head(features), features @ head[0].weight.T)
    assert len(head) == 1


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"'mlp'.*bn_linear or linear"):
        build_head("mlp", 6, 3)


def test_zero_shot_weights_average_unit_prompts(tiny_model):
    torch.manual_seed(0)
    model, _ = build_model(tiny_model.name)
    names, templates = ["red cat", "old dog"], ["a photo of a {}.", "{}"]
    weights = build_zero_shot_weights(model, names, templates)
    for row, name in zip(weights, names, strict=True):
        texts = [template.format(name) for template in templates]
        with torch.no_grad():
            prompts = model.encode_text(tokenize(texts, model.spec.text.context_length))
        unit = prompts / prompts.norm(dim=1, keepdim=True)
        mean = unit.sum(0) / 2
        torch.testing.assert_close(row, mean / mean.norm())
    assert weights.shape == (2, 16)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
