"""Optimizers of a fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from finetune.sections import OptimizerSection


def build_optimizer(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over groups that carry their own `lr` and `weight_decay`.

    Raises:
        ValueError: 8-bit state was asked for and torchao is not installed.
    """
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.beta1)
    betas = (section.beta1, section.beta2)
    if section.name == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "optimizer.name is 'adamw8bit' and torchao is not installed; pip install 'eva-clip-transfer[lowbit]', "
                "or use adamw"
            ) from error
        optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=section.lr, betas=betas, eps=section.eps)
        return optimizer
    return torch.optim.AdamW(groups, lr=section.lr, betas=betas, eps=section.eps)
