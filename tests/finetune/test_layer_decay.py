from __future__ import annotations

import pytest
import torch
from torch import nn

from eva_clip import build_classifier
from finetune.layer_decay import build_param_groups, count_blocks, describe_groups

FAMILIES = ["eva01", "eva02", "eva02_post_norm", "clip"]


@pytest.fixture(scope="module")
def giant():
    with torch.device("meta"):
        return build_classifier("EVA01-CLIP-g-14", 1000, pool="gap")


def test_published_model_has_42_buckets_of_two_groups(giant):
    groups = build_param_groups(giant, 3e-5, 0.05, 0.9)
    assert len(groups) == 84
    assert sum(p.numel() for group in groups for p in group["params"]) == 1_012_555_112
    assert sorted({group["layer"] for group in groups}) == list(range(42))
    for group in groups:
        assert group["lr"] == pytest.approx(3e-5 * 0.9 ** (41 - group["layer"]), rel=1e-12)
    giant.tower.patch_embed.requires_grad_(False)
    try:
        assert len(build_param_groups(giant, 3e-5, 0.05, 0.9)) == 83
    finally:
        giant.tower.patch_embed.requires_grad_(True)


def test_groups_of_the_published_model_by_name(giant):
    """Written out from the published rule: embeddings 0, block i in i + 1, the rest 41; 1-D, cls and pos undecayed."""
    by_name = {
        name: (group["layer"], group["weight_decay"])
        for group in build_param_groups(giant, 1.0, 0.05, 0.5)
        for name in group["names"]
    }
    assert by_name["tower.patch_embed.proj.weight"] == (0, 0.05)
    assert by_name["tower.patch_embed.proj.bias"] == (0, 0.0)
    assert by_name["tower.cls_token"] == by_name["tower.pos_embed"] == (0, 0.0)
    assert by_name["tower.blocks.0.attn.qkv.weight"] == (1, 0.05)
    assert by_name["tower.blocks.0.attn.q_bias"] == (1, 0.0)
    assert by_name["tower.blocks.39.norm2.weight"] == (40, 0.0)
    assert by_name["tower.fc_norm.weight"] == (41, 0.0)
    assert by_name["head.weight"] == (41, 0.05)
    assert by_name["head.bias"] == (41, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_of_every_family_is_in_one_group(build_tower, family):
    tower = build_tower(family)
    groups = build_param_groups(tower, 1.0, 0.1, 0.75)
    listed = [name for group in groups for name in group["names"]]
    assert sorted(listed) == sorted(name for name, _ in tower.named_parameters())
    assert all(tower.get_parameter(n) is p for g in groups for n, p in zip(g["names"], g["params"], strict=True))
    assert {group["layer"] for group in groups} == set(range(6))


def test_rates_survive_a_scheduler_step(build_tower):
    groups = build_param_groups(build_tower(), 1.0, 0.1, 0.5)
    wanted = [group["lr"] / 2 for group in groups]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == wanted


def test_frozen_and_adapter_parameters(build_tower):
    tower = build_tower()
    tower.requires_grad_(False)
    tower.blocks[2].attn.lora_A = nn.Linear(32, 4, bias=False)
    tower.head.requires_grad_(True)
    groups = build_param_groups(tower, 1.0, 0.1, 0.5)
    layers = {name: group["layer"] for group in groups for name in group["names"]}
    assert layers == {"blocks.2.attn.lora_A.weight": 3, "head.weight": 5, "head.bias": 5}
    assert count_blocks(tower) == 4


def test_nothing_to_train_and_bad_values(build_tower):
    tower = build_tower()
    for value in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="layer_decay is"):
            build_param_groups(tower, 1.0, 0.1, value)
    tower.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters are frozen"):
        build_param_groups(tower, 1.0, 0.1, 0.9)
    with pytest.raises(ValueError, match="transformer blocks"):
        build_param_groups(nn.Linear(2, 2), 1.0, 0.1, 0.9)


def test_description_counts_what_the_groups_hold(build_tower):
    tower = build_tower()
    rows = describe_groups(build_param_groups(tower, 1.0, 0.1, 0.9))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in tower.parameters())
    assert rows[0]["layer"] == 0
    assert rows[-1]["layer"] == 5
