"""Stochastic depth that skips the work of dropped samples instead of multiplying it by zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    Branch = Callable[[torch.Tensor], torch.Tensor]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled draw is from another stream, and its number of samples differs each time
def draw_kept(batch: int, rate: float) -> torch.Tensor:
    """Positions of the samples that keep a branch, int64 [K]: each with probability 1 - rate, from torch's CPU stream.

    On the CPU because a draw on the GPU would have to be waited for before the batch can be cut.
    """
    return (torch.rand(batch) >= rate).nonzero().flatten()


class _IndexAdd(torch.autograd.Function):
    """`index_add` on the first dimension that keeps no copy of what it adds; torch's keeps it for its shape alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept)
        return x.index_add(0, kept, update)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (kept,) = ctx.saved_tensors
        return gradients[0], None, gradients[0].index_select(0, kept)


def add_kept(x: torch.Tensor, branch: Branch, rate: float) -> torch.Tensor:
    """`x + DropPath(rate)(branch(x))` on tokens [B, T, D], with the branch computed for the kept samples alone.

    The expectation is that of timm's `DropPath` (kept samples are divided by 1 - rate), and so is the result for the
    same draw. A branch that no sample keeps still runs on one, times zero: every process of a distributed run must
    have gradients of the same parameters.
    """
    kept = draw_kept(len(x), rate)
    if len(kept) == len(x):
        return x + branch(x) / (1 - rate)
    scale = 1 / (1 - rate)
    if len(kept) == 0:
        kept, scale = torch.zeros(1, dtype=torch.int64), 0.0
    kept = kept.to(x.device, non_blocking=True)
    update = branch(x[kept]) * scale
    added: torch.Tensor = _IndexAdd.apply(x, kept, update.to(x.dtype))
    return added


class _Skipping:
    """Forward of a block with two residual branches, each skipped for the samples that drop it."""

    skip_rates: tuple[float, float]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tokens [B, T, D] to tokens [B, T, D]."""
        if not self.training or not any(self.skip_rates):  # type: ignore[attr-defined]
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        attention, mlp = self.branches(*args, **kwargs)
        for branch, rate in zip((attention, mlp), self.skip_rates, strict=True):
            x = add_kept(x, branch, rate)
        return x

    def branches(self, *args: Any, **kwargs: Any) -> tuple[Branch, Branch]:
        """The two branches; `args` and `kwargs` go to attention, and must not depend on the sample."""
        raise NotImplementedError


class SkippingEvaBlock(_Skipping, EvaBlock):  # type: ignore[misc]  # timm is untyped
    """timm's pre-norm `EvaBlock`."""

    def branches(self, *args: Any, **kwargs: Any) -> tuple[Branch, Branch]:
        """Attention and MLP, each behind its norm and times its layer scale where there is one."""

        def attention(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.attn(self.norm1(x), *args, **kwargs)
            return out if self.gamma_1 is None else self.gamma_1 * out

        def mlp(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.mlp(self.norm2(x))
            return out if self.gamma_2 is None else self.gamma_2 * out

        return attention, mlp


class SkippingEvaBlockPostNorm(_Skipping, EvaBlockPostNorm):  # type: ignore[misc]
    """timm's post-norm `EvaBlockPostNorm`."""

    def branches(self, *args: Any, **kwargs: Any) -> tuple[Branch, Branch]:
        """Attention and MLP, each in front of its norm."""
        return lambda x: self.norm1(self.attn(x, *args, **kwargs)), lambda x: self.norm2(self.mlp(x))


class SkippingBlock(_Skipping, Block):  # type: ignore[misc]
    """timm's `Block` of a CLIP tower."""

    def branches(self, *args: Any, **kwargs: Any) -> tuple[Branch, Branch]:
        """Attention and MLP, each behind its norm and times its layer scale."""
        return (
            lambda x: self.ls1(self.attn(self.norm1(x), *args, **kwargs)),
            lambda x: self.ls2(self.mlp(self.norm2(x))),
        )


SKIPPING: dict[type[nn.Module], type[nn.Module]] = {
    EvaBlock: SkippingEvaBlock,
    EvaBlockPostNorm: SkippingEvaBlockPostNorm,
    Block: SkippingBlock,
}


def skip_dropped_paths(tower: nn.Module) -> int:
    """Let every block of a tower skip dropped samples; returns how many blocks have a rate above 0.

    Blocks change class in place, so names and tensors stay. Evaluation is untouched. Call before adapters, compile
    and any wrapper.

    Raises:
        ValueError: a block that drops paths is of a kind that is not known here.
    """
    changed = 0
    for name, block in tower.named_modules():
        rates = [getattr(getattr(block, part, None), "drop_prob", 0.0) for part in ("drop_path1", "drop_path2")]
        if not any(isinstance(getattr(block, part, None), DropPath) for part in ("drop_path1", "drop_path2")):
            continue
        if type(block) not in SKIPPING:
            raise ValueError(f"{name} is a {type(block).__name__}; expected one of {[k.__name__ for k in SKIPPING]}")
        block.__class__ = SKIPPING[type(block)]
        block.skip_rates = (float(rates[0]), float(rates[1]))
        changed += 1
    return changed
