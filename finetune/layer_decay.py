"""Layer-wise learning-rate decay: parameter groups whose `lr` already carries the factor of their layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
"""Name of a parameter of transformer block i, adapters inside the block included."""
EMBEDDINGS = frozenset({"patch_embed", "cls_token", "pos_embed", "norm_pre", "reg_token", "rope"})
"""Modules and parameters in front of the blocks."""
NO_DECAY = frozenset({"cls_token", "pos_embed"})


def count_blocks(model: nn.Module) -> int:
    """Number of transformer blocks of a model's tower.

    Raises:
        ValueError: no parameter lies in a block.
    """
    found = [int(match[1]) for name, _ in model.named_parameters() if (match := BLOCK.search(name))]
    if not found:
        raise ValueError(
            "no parameter is named `blocks.<i>.…`; layer decay needs a vision tower with transformer blocks"
        )
    return max(found) + 1


def layer_of(name: str, num_blocks: int) -> int:
    """Bucket of a parameter: 0 for embeddings, i + 1 for block i, `num_blocks` + 1 for all that follows the blocks."""
    if match := BLOCK.search(name):
        return int(match[1]) + 1
    return 0 if EMBEDDINGS & set(name.split(".")) else num_blocks + 1


def build_param_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of a model's trainable parameters, ordered by layer, decayed ones first.

    The rate of bucket l is `lr · layer_decay^(L - l)` with L the last bucket (norm, `fc_norm` and head), baked into
    the group's `lr`: trainers ignore timm's `lr_scale`. Weight decay skips tensors of at most one dimension,
    `cls_token` and `pos_embed`. Buckets are those of the published fine-tunes: 42 for a tower of 40 blocks.

    Args:
        model: with parameters of a tower named `blocks.<i>.…`; frozen ones are left out, and groups without any.
        lr: peak learning rate of the last bucket, absolute.
        weight_decay: of matrices.
        layer_decay: factor from a bucket to the one before it, in (0, 1]; 1 is one rate for all.

    Returns:
        Groups with `params`, `names`, `lr`, `weight_decay` and `layer`.

    Raises:
        ValueError: nothing is trainable, there are no blocks, or `layer_decay` is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; expected a factor above 0 and at most 1")
    num_blocks = count_blocks(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_blocks)
        spared = parameter.ndim <= 1 or bool(NO_DECAY & set(name.split(".")))
        group = groups.setdefault(
            (layer, spared),
            {
                "params": [],
                "names": [],
                "lr": lr * layer_decay ** (num_blocks + 1 - layer),
                "weight_decay": 0.0 if spared else weight_decay,
                "layer": layer,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("all parameters are frozen: there is nothing to train; unfreeze some, or use probes.linear")
    return [groups[key] for key in sorted(groups)]


def describe_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One plain row a group for `--plan`: layer, lr, weight decay, tensors, parameters and the first name."""
    return [
        {
            "layer": group["layer"],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
            "first": group["names"][0],
        }
        for group in groups
    ]
