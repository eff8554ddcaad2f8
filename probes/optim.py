"""Optimizers of heads; LARS by the published rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import Lars as TimmLars
from torch import nn

if TYPE_CHECKING:
    from probes.sections import OptimizerSection


class Lars(TimmLars):  # type: ignore[misc]  # timm is untyped
    """timm's LARS with weight decay inside the gradient before its norm is taken.

    The published rule for matrices is d = g + wd·p, d *= trust·|p|/|d|. timm divides by |g| + wd·|p| instead, so decay
    is added to the gradient here and timm sees none. At weight decay 0 this is timm's optimizer, bit for bit.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; gradients of decayed parameters are replaced by g + decay·p."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            decay = group.get("decay", 0.0)
            for parameter in group["params"]:
                if decay and parameter.grad is not None:
                    parameter.grad = parameter.grad.add(parameter, alpha=decay)
        super().step()
        return loss


def build_lars(
    params: Iterable[nn.Parameter],
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
) -> torch.optim.Optimizer:
    """LARS as the published linear probes ran it.

    Matrices (two or more dimensions): d = g + weight_decay·p, then d *= trust_coefficient·|p|/|d| (factor 1 where
    either norm is 0). Biases and norms (at most one dimension): d = g. Then mu = momentum·mu + d and p -= lr·mu.

    Args:
        params: parameters of the head.
        lr: learning rate, absolute.
        momentum: momentum coefficient.
        weight_decay: L2 coefficient of matrices.
        trust_coefficient: the layer-wise ratio's factor.
    """
    every = [parameter for parameter in params if parameter.requires_grad]
    matrices = [parameter for parameter in every if parameter.ndim > 1]
    vectors = [parameter for parameter in every if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices, "always_adapt": True, "decay": weight_decay})
    if vectors:
        groups.append({"params": vectors, "always_adapt": False, "decay": 0.0})
    return Lars(groups, lr=lr, momentum=momentum, weight_decay=0.0, trust_coeff=trust_coefficient)


def build_optimizer(params: Iterable[nn.Parameter], section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer that a recipe names; biases and norms have no weight decay."""
    if section.name == "lars":
        return build_lars(params, section.lr, section.momentum, section.weight_decay)
    every = list(params)
    groups = [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)
    return torch.optim.AdamW(groups, lr=section.lr, betas=(section.momentum, 0.999))
