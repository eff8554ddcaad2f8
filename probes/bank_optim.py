"""Optimizers of stacked heads: one update of many heads, each with a learning rate and a weight decay of its own.

Shapes: H heads, C classes, D feature dimensions, B samples. Head by head each is the optimizer that
`probes.optim.build_optimizer` builds, up to the rounding of float32; biases have no weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class StackedOptimizer(nn.Module):
    """Base: holds the weight decays [H, 1, 1]; parameters and gradients come with every `step`."""

    decays: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], decays: Sequence[float], momentum: float) -> None:
        super().__init__()
        assert len(decays) == shape[0]
        self.momentum = momentum
        self.register_buffer("decays", torch.tensor(decays, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.has_decay = any(decays)

    def step(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        errors: torch.Tensor,
        inputs: torch.Tensor,
        rates: torch.Tensor,
    ) -> None:
        """Update all heads in place.

        The gradient of the weights is the product errors @ inputs [H * C, D], of the biases the sum of errors over B.

        Args:
            weight: [H, C, D].
            bias: [H, C].
            errors: [H, C, B], the derivative of each head's loss by its logits.
            inputs: [B, D], what the heads multiplied.
            rates: [H, 1, 1], the learning rates of this step.
        """
        raise NotImplementedError

    def clear(self, heads: torch.Tensor) -> None:
        """Forget the state of some heads; `heads` is bool [H]."""
        for state in self.buffers():
            if state.ndim > 1 and state is not self.decays:
                state[heads] = 0


class StackedSGD(StackedOptimizer):
    """`torch.optim.SGD`: mu = momentum * mu + g + decay * p; p -= lr * mu."""

    momentum_weight: torch.Tensor
    momentum_bias: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], decays: Sequence[float], momentum: float) -> None:
        super().__init__(shape, decays, momentum)
        self.register_buffer("momentum_weight", torch.zeros(shape))
        self.register_buffer("momentum_bias", torch.zeros(shape[:2]))

    def step(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        errors: torch.Tensor,
        inputs: torch.Tensor,
        rates: torch.Tensor,
    ) -> None:
        """Update all heads in place; the product adds onto the decayed momentum in the same pass."""
        flat = self.momentum_weight.flatten(0, 1)
        flat.addmm_(errors.flatten(0, 1), inputs, beta=self.momentum)
        if self.has_decay:
            self.momentum_weight.addcmul_(weight, self.decays)
        self.momentum_bias.mul_(self.momentum).add_(errors.sum(2))
        weight.addcmul_(self.momentum_weight, rates, value=-1)
        bias.addcmul_(self.momentum_bias, rates[:, :, 0], value=-1)


class StackedLars(StackedSGD):
    """`probes.optim.Lars`: for matrices d = g + decay * p, scaled by trust * |p| / |d| of each head, then momentum."""

    trust_coefficient = 0.001
    eps = 1e-8
    """Added to |d|, as timm does."""
    gradient: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], decays: Sequence[float], momentum: float) -> None:
        super().__init__(shape, decays, momentum)
        self.register_buffer("gradient", torch.zeros(shape), persistent=False)

    def step(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        errors: torch.Tensor,
        inputs: torch.Tensor,
        rates: torch.Tensor,
    ) -> None:
        """Update all heads in place."""
        direction = self.gradient
        torch.mm(errors.flatten(0, 1), inputs, out=direction.flatten(0, 1))
        if self.has_decay:
            direction.addcmul_(weight, self.decays)
        size = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        slope = torch.linalg.vector_norm(direction.flatten(1), dim=1)
        trust = torch.where((size > 0) & (slope > 0), self.trust_coefficient * size / (slope + self.eps), 1.0)
        self.momentum_weight.mul_(self.momentum).addcmul_(direction, trust.view(-1, 1, 1))
        self.momentum_bias.mul_(self.momentum).add_(errors.sum(2))
        weight.addcmul_(self.momentum_weight, rates, value=-1)
        bias.addcmul_(self.momentum_bias, rates[:, :, 0], value=-1)


class StackedAdamW(StackedOptimizer):
    """`torch.optim.AdamW` with betas (momentum, 0.999) and eps 1e-8; weight decay is decoupled from the gradient."""

    beta2 = 0.999
    eps = 1e-8
    mean_weight: torch.Tensor
    mean_bias: torch.Tensor
    square_weight: torch.Tensor
    square_bias: torch.Tensor
    gradient: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], decays: Sequence[float], momentum: float) -> None:
        super().__init__(shape, decays, momentum)
        for name in ("mean", "square"):
            self.register_buffer(f"{name}_weight", torch.zeros(shape))
            self.register_buffer(f"{name}_bias", torch.zeros(shape[:2]))
        self.register_buffer("gradient", torch.zeros(shape), persistent=False)
        self.steps = 0  # a plain number: reading it waits for no device

    def get_extra_state(self) -> dict[str, int]:
        """The count of steps, which the bias correction needs."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue the count."""
        self.steps = state["steps"]

    def step(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        errors: torch.Tensor,
        inputs: torch.Tensor,
        rates: torch.Tensor,
    ) -> None:
        """Update all heads in place."""
        torch.mm(errors.flatten(0, 1), inputs, out=self.gradient.flatten(0, 1))
        self.steps += 1
        if self.has_decay:
            weight.mul_(1 - rates * self.decays)
        self._move(weight, self.mean_weight, self.square_weight, self.gradient, rates)
        self._move(bias, self.mean_bias, self.square_bias, errors.sum(2), rates[:, :, 0])

    def _move(
        self,
        parameter: torch.Tensor,
        mean: torch.Tensor,
        square: torch.Tensor,
        gradient: torch.Tensor,
        rates: torch.Tensor,
    ) -> None:
        """Adam's step; `gradient` is overwritten."""
        mean.lerp_(gradient, 1 - self.momentum)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = torch.sqrt(square, out=gradient)
        denominator.div_((1 - self.beta2**self.steps) ** 0.5).add_(self.eps)
        update = torch.div(mean, denominator, out=denominator)
        parameter.addcmul_(update, rates, value=-1 / (1 - self.momentum**self.steps))


STACKED: dict[str, type[StackedOptimizer]] = {"sgd": StackedSGD, "lars": StackedLars, "adamw": StackedAdamW}
"""By the names that a recipe uses."""
