"""Heads of one kind on one feature kind, stacked into one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from probes.bank_optim import STACKED
from probes.heads import build_head

if TYPE_CHECKING:
    from probes.bank import BankHead

BN_MOMENTUM, BN_EPS = 0.1, 1e-6
"""BatchNorm of the head "bn_linear"; it has no affine parameters, so every head of the group sees the same inputs."""


class HeadGroup(nn.Module):
    """Weights [H, C, D] and biases [H, C] of H heads, with their optimizer's state; all of it buffers.

    Logits are weight @ features.T, laid out [H, C, B]: one matrix product forward, one for the gradient.

    Args:
        kind: "bn_linear" or "linear".
        heads: the group's heads, for their learning rates and weight decays.
        feature_dim: D.
        num_classes: C.
        optimizer: "sgd", "lars" or "adamw".
        momentum: momentum of LARS and SGD; beta1 of AdamW.
        initial: weights [C, D] that every head starts from; None draws them as `build_head` does after
            `torch.manual_seed(seed)`, the same for every head.
        seed: of the initial weights.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    rates: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(
        self,
        kind: str,
        heads: Sequence[BankHead],
        feature_dim: int,
        num_classes: int,
        *,
        optimizer: str,
        momentum: float,
        initial: torch.Tensor | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.kind = kind
        shape = (len(heads), num_classes, feature_dim)
        if initial is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                drawn = build_head(kind, feature_dim, num_classes)[-1]
            assert isinstance(drawn, nn.Linear)
            initial = drawn.weight.detach()
        self.register_buffer("weight", initial.float().cpu().expand(shape).clone())
        self.register_buffer("bias", torch.zeros(shape[:2]))
        rates = torch.tensor([head.lr for head in heads], dtype=torch.float64)
        self.register_buffer("rates", rates.view(-1, 1, 1), persistent=False)
        self.register_buffer("running_mean", torch.zeros(feature_dim))
        self.register_buffer("running_var", torch.ones(feature_dim))
        self.optimizer = STACKED[optimizer](shape, [head.weight_decay for head in heads], momentum)

    def train_step(
        self,
        features: torch.Tensor,
        errors_of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        factor: float,
    ) -> torch.Tensor:
        """Update every head on one batch.

        Args:
            features: [B, D], any floating type.
            errors_of: from logits [H, C, B] to their derivative [H, C, B] and the losses [H].
            factor: multiplies the heads' learning rates.

        Returns:
            The losses [H] before the update.
        """
        inputs = self._inputs(features, training=True)
        errors, losses = errors_of(self._product(inputs))
        self.optimizer.step(self.weight, self.bias, errors, inputs, (self.rates * factor).float())
        return losses

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [H, C, B] of features [B, D] under the running statistics."""
        return self._product(self._inputs(features, training=False))

    def freeze(self, heads: torch.Tensor) -> None:
        """Set some heads to 0 and train them no more; `heads` is bool [H]."""
        self.rates[heads] = 0
        self.weight[heads] = 0
        self.bias[heads] = 0
        self.optimizer.clear(heads)

    def build_single(self, position: int) -> nn.Sequential:
        """One head of the group as `build_head` makes it, in eval mode, on the CPU."""
        classes, width = self.weight.shape[1:]
        with torch.random.fork_rng(devices=[]):
            single = build_head(self.kind, width, classes)
        state = {"weight": self.weight[position], "bias": self.bias[position]}
        single[-1].load_state_dict(state)
        if self.kind == "bn_linear":
            single[0].load_state_dict(
                {"running_mean": self.running_mean, "running_var": self.running_var}, strict=False
            )  # but for the number of batches, which a fixed momentum does not use
        return single.eval()

    def _inputs(self, features: torch.Tensor, training: bool) -> torch.Tensor:
        features = features.to(self.weight.device).float()
        if self.kind == "linear":
            return features
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(features, *statistics, training=training, momentum=BN_MOMENTUM, eps=BN_EPS)

    def _product(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = torch.mm(self.weight.flatten(0, 1), inputs.T)  # [H * C, B]
        return logits.view(*self.bias.shape, len(inputs)).add_(self.bias[:, :, None])
