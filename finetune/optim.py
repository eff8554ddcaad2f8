"""Optimizers of a fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from finetune.sections import OptimizerSection


def build_optimizer(
    groups: list[dict[str, Any]], section: OptimizerSection, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over groups that carry their own `lr` and `weight_decay`.

    Args:
        groups: of `build_param_groups`.
        section: the recipe's.
        fused: one pass over all tensors. Not with a loss scale: a fused step divides by it itself, and the gradients
            that are measured and clipped before would still be scaled.

    Raises:
        ValueError: "adamw_8bit" without its extra.
    """
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.beta1)
    betas = (section.beta1, section.beta2)
    if section.name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "optimizer.name is 'adamw_8bit' and bitsandbytes is not installed; pip install "
                "'eva-clip-transfer[optim8bit]'"
            ) from error
        eight_bit: torch.optim.Optimizer = AdamW8bit(groups, lr=section.lr, betas=betas, eps=section.eps)
        return eight_bit
    return torch.optim.AdamW(groups, lr=section.lr, betas=betas, eps=section.eps, fused=fused)
