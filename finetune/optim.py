"""Optimizers of a fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from finetune.sections import OptimizerSection


def build_optimizer(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over groups that carry their own `lr` and `weight_decay`."""
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.beta1)
    betas = (section.beta1, section.beta2)
    return torch.optim.AdamW(groups, lr=section.lr, betas=betas, eps=section.eps)
