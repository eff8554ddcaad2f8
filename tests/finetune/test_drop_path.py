from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import finetune.drop_path
from finetune.drop_path import add_kept, draw_kept, skip_dropped_paths

FAMILIES = ["eva01", "eva02", "eva02_post_norm", "clip"]


class GivenMask(nn.Module):
    """Drop path with masks given in advance, the definition written out."""

    def __init__(self, masks: list[torch.Tensor], rate: float) -> None:
        super().__init__()
        self.masks, self.rate = masks, rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.masks.pop(0)[:, None, None] / (1 - self.rate)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_timm_for_the_same_draws(build_tower, family, monkeypatch):
    images = torch.randn(6, 3, 32, 32)
    ours = build_tower(family, drop_path_rate=0.6).train()
    reference = copy.deepcopy(ours)
    masks: list[torch.Tensor] = []
    for block in reference.blocks[1:]:  # timm gives the first block rate 0
        block.drop_path1 = GivenMask(masks, block.drop_path1.drop_prob)
        block.drop_path2 = GivenMask(masks, block.drop_path2.drop_prob)
    drawn = []

    def record(batch: int, rate: float) -> torch.Tensor:
        kept = draw_kept(batch, rate)
        drawn.append(torch.zeros(batch).index_fill(0, kept, 1.0))
        return kept

    monkeypatch.setattr(finetune.drop_path, "draw_kept", record)
    assert skip_dropped_paths(ours) == 3
    out = ours(images)
    assert len(drawn) == 6
    masks.extend(drawn)
    expected = reference(images)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_evaluation_are_untouched(build_tower, family):
    tower = build_tower(family, drop_path_rate=0.5).eval()
    names, images = list(tower.state_dict()), torch.randn(2, 3, 32, 32)
    before = tower(images)
    skip_dropped_paths(tower)
    assert list(tower.state_dict()) == names
    assert torch.equal(tower(images), before)


def test_expectation_is_the_undropped_sum():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3)
    branch = nn.Linear(3, 3)
    many = add_kept(x.expand(40_000, 2, 3), branch, 0.4)
    torch.testing.assert_close(many.mean(0, keepdim=True), x + branch(x), atol=0.03, rtol=0)
    spread = many.var(0).mean() / branch(x).square().mean()
    assert spread.item() == pytest.approx(0.4 / 0.6, rel=0.05)  # variance of Bernoulli(0.6) / 0.6


def test_only_the_kept_share_is_computed():
    seen = []

    def branch(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    torch.manual_seed(0)
    for _ in range(500):
        add_kept(torch.zeros(16, 1, 1), branch, 0.4)
    assert sum(seen) / (500 * 16) == pytest.approx(0.6, abs=0.02)


def test_a_branch_that_all_drop_still_has_gradients(monkeypatch):
    monkeypatch.setattr(finetune.drop_path, "draw_kept", lambda batch, rate: torch.empty(0, dtype=torch.int64))
    branch, x = nn.Linear(3, 3), torch.randn(4, 2, 3)
    out = add_kept(x, branch, 0.5)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(branch.weight.grad, torch.zeros(3, 3))


def test_unknown_blocks_are_named(build_tower):
    class Other(type(build_tower(drop_path_rate=0.5).blocks[1])):
        pass

    tower = build_tower(drop_path_rate=0.5)
    tower.blocks[1].__class__ = Other
    with pytest.raises(ValueError, match=r"blocks.1 is a Other; expected one of"):
        skip_dropped_paths(tower)
