"""The class token of a vision tower without the work of the last block that only patch tokens would see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from timm.models.eva import Eva


@contextlib.contextmanager
def class_token_alone(tower: Eva) -> Iterator[None]:
    """Context in which the last block computes the class token alone; its patch tokens are of no meaning.

    Behind the last block's attention no token sees another, so that its output projection and MLP run on the class
    token alone, [B, 1, D], which the residual sums spread over the tokens. That leaves out three quarters of the block:
    6 % of a tower of 12 blocks.
    """

    def keep_first(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        return (arguments[0][:, :1], *arguments[1:])

    last = tower.blocks[-1]
    handles = [part.register_forward_pre_hook(keep_first) for part in (last.attn.proj, last.mlp)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
